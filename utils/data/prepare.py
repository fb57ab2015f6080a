"""Files → checked rows → token ids and labels, made once and kept on disk.

A prepared dataset lies in a folder named by a hash of everything it depends on: the files'
content, the template, the tokenizer, the lengths, the libraries that encode and pack. A second
start finds it there.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path

from loguru import logger

from utils.data.encode import Part, RowKind, encoded_parts
from utils.data.files import files_left_out, find_files
from utils.data.keys import check_unchanged, content_key, rows_key
from utils.data.report import SHOWN, TOO_LONG, DataReport, from_stored, refuse_nothing_left, to_stored
from utils.runtime.distributed import all_of, is_first_here
from utils.runtime.errors import Problem, UserError, is_about_the_disk
from utils.storage.files import checksum

_BATCHES = 20  # chunks written together: whoever opens the rows reads a page or more of every batch


def load_rows(paths: str, flag: str, kind: RowKind, on_bad_row: str, cache_dir: str | None, workers: int | None):
    """Prepares the rows of `paths`, or reads them from the cache.

    Args:
        paths: files, folders, globs, separated by commas.
        flag: the flag they came by.
        kind: the task's way with rows.
        on_bad_row: `auto`, `error` or `drop`, as in CommonArgs.
        cache_dir: where prepared rows lie.
        workers: processes that tokenise; None for a number that suits.

    Returns:
        (datasets.Dataset with input_ids and labels, DataReport)

    Raises:
        UserError: a missing file, rows that cannot be used, or none that can; a file that was changed meanwhile.
    """
    files, problems = find_files(paths, flag, kind.suffixes)
    if problems:
        raise UserError(*problems)
    for note in files_left_out(paths, flag, kind.suffixes):
        logger.info("{}", note)
    sums = {file: checksum(file) for file in files}
    hashes = {file: sha for file, (sha, _) in sums.items()}
    content = content_key(hashes, kind, on_bad_row)
    # the names stand in the report, so they are part of what is kept
    folder = _cache_root(cache_dir) / hashlib.sha256(json.dumps([content, files]).encode()).hexdigest()[:32]
    name = flag.removeprefix("--").removesuffix("_data_path") + " data"
    with _one_at_a_time(folder):
        prepared = _from_cache(folder, files)
        if prepared:
            logger.info("{}: prepared rows found in {}", name, folder)
        else:
            started = time.perf_counter()
            try:
                prepared = _prepare(hashes, kind, on_bad_row, folder, workers)
            except Exception as error:
                if not is_about_the_disk(error):
                    raise
                raise UserError(
                    f"prepared rows cannot be kept in {str(folder.parent)!r}: {error}; make room, or give another "
                    "--cache_dir"
                ) from error
            logger.info("{}: prepared in {:.1f} s, kept in {}", name, time.perf_counter() - started, folder)
    dataset, report = prepared
    report.files, report.hashes = files, hashes
    report.bytes_of = {file: size for file, (_, size) in sums.items()}
    if len(set(all_of([report.key]))) > 1:
        raise UserError(f"{flag}: the processes have read different rows; give each machine the same files")
    report.log(name)
    return dataset, report


@contextlib.contextmanager
def _one_at_a_time(folder: Path):
    """One process prepares the rows, others that want the same wait, for as long as it takes, and read them.

    A lock of the operating system and no collective: those time out, and this one is free again when its holder dies.
    """
    from filelock import FileLock

    if not is_first_here():
        # the first process shows the progress; it is soon there, if it lives
        patience = time.monotonic() + 10
        while not folder.is_dir() and not _lock_of(folder).exists() and time.monotonic() < patience:
            time.sleep(0.1)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"prepared rows cannot be kept in {str(folder.parent)!r}: {error.strerror}; give another --cache_dir"
        ) from error
    with FileLock(_lock_of(folder)):
        try:
            yield
        finally:
            _lock_of(folder).unlink(missing_ok=True)  # while it is held; filelock lets nobody hold a removed file


def _lock_of(folder: Path) -> Path:
    """Not beside the rows: a lock is of one machine, and their disk may be shared by several."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return Path(tempfile.gettempdir()) / f"llm_dojo-{os.getuid()}-{name}.lock"


def _from_cache(folder: Path, files: list[str]):
    """The rows kept in `folder`; None where there are none, or where a file of theirs is damaged."""
    from datasets import load_from_disk

    if not folder.is_dir():
        return None
    try:
        kept = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        # others may lie there: TRL keeps the reference's log-probabilities beside the rows
        if any((folder / name).stat().st_size != size for name, size in kept.pop("sizes").items()):
            raise ValueError("a file is missing or cut short")
        return load_from_disk(str(folder)), from_stored(kept, files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the rows kept in {} are damaged ({}); they are made anew", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _cache_root(cache_dir: str | None) -> Path:
    import datasets

    return Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "llm_dojo").expanduser()


def _prepare(hashes: dict[str, str], kind: RowKind, on_bad_row: str, folder: Path, workers: int | None):
    """Reads, checks and encodes the rows, and moves them into the cache when they are whole.

    Args:
        hashes: file → the sha256 that the cache's folder is named by.
        kind, on_bad_row, folder, workers: as in `load_rows`.

    Raises:
        UserError: what was read is not what was hashed.
    """
    from datasets import Dataset, load_from_disk

    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
    try:
        report = _write_rows(list(hashes), kind, on_bad_row, scratch / "encoded.arrow", workers)
        check_unchanged(hashes)
        dataset = Dataset.from_file(str(scratch / "encoded.arrow"))
        if kind.pack:
            dataset = kind.pack(dataset)
            report.key = rows_key(dataset)
            dataset.save_to_disk(str(scratch / "rows"))
        else:
            report.key = rows_key(dataset)
            _keep_as_written(dataset, scratch / "encoded.arrow", scratch / "rows")
        sizes = {path.name: path.stat().st_size for path in (scratch / "rows").iterdir()}
        report_file = scratch / "rows" / "report.json"
        report_file.write_text(json.dumps({**to_stored(report), "sizes": sizes}), encoding="utf-8")
        del dataset
        try:
            os.rename(scratch / "rows", folder)
        except OSError:
            # another run prepared the same rows meanwhile; one of the two is enough
            if not (folder / "report.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_from_disk(str(folder)), report


def _keep_as_written(dataset, file: Path, folder: Path) -> None:
    """A folder for `load_from_disk` of an Arrow file; `save_to_disk` would read it all into memory, and write it again.

    Args:
        dataset: the rows of the file.
        file: moved into the folder.
    """
    dataset.select(range(1)).save_to_disk(str(folder))
    (first_row,) = folder.glob("*.arrow")
    file.replace(first_row)


def _write_rows(files: list[str], kind: RowKind, on_bad_row: str, path: Path, workers: int | None) -> DataReport:
    """Writes the encoded rows to an Arrow file, part by part.

    Raises:
        UserError: naming the rows that stop the run, the first 20 by file and line.
    """
    import pyarrow
    from datasets.arrow_writer import ArrowWriter

    report, refused, batches = DataReport(), [], []

    def write():
        rows = pyarrow.Table.from_batches(batches)
        writer.write_table(rows, writer_batch_size=rows.num_rows)
        batches.clear()

    with ArrowWriter(path=str(path)) as writer, closing(encoded_parts(files, kind, on_bad_row, workers)) as parts:
        for part in parts:
            _count(report, part)
            refused += part.refused
            if part.batch is not None and not refused:
                batches.append(part.batch)
            if len(batches) == _BATCHES:
                write()
        _refuse(refused, report, kind, files)
        if batches:
            write()
        writer.finalize()
    return report


def _count(report: DataReport, part: Part) -> None:
    report.rows += part.rows
    report.kept += part.batch.num_rows if part.batch is not None else 0
    report.tokens += part.tokens
    report.trained_tokens += part.trained_tokens
    for line, reason, what in sorted(part.dropped):
        report.drop(part.file, line, reason, what)
    for line in part.shortened:
        report.shorten(part.file, line)
    for line, reason in part.untrained:
        report.leave_untrained(part.file, line, reason)
    report.note_unread(part.file, part.unread)


def _refuse(refused: list[str], report: DataReport, kind: RowKind, files: list[str]) -> None:
    if refused:
        shown = "".join(f"\n     {problem}" for problem in refused[:SHOWN])
        more = f"\n     … and {len(refused) - SHOWN:,} more" if len(refused) > SHOWN else ""
        message = (
            f"{len(refused):,} of {report.rows:,} rows cannot be used:{shown}{more}\n"
            "   Mend them, or give --on_bad_row drop to train without those that stand alone on a line"
        )
        raise UserError(Problem(message, "ROW_UNREADABLE", ("on_bad_row",)))
    if kind.refuse_long and TOO_LONG in report.dropped:
        message = (
            f"{report.dropped[TOO_LONG]:,} of {report.rows:,} rows are too long, and --overlong error is given:"
            f"{report.named_places()}\n   Raise --max_len, or give --overlong truncate or drop"
        )
        raise UserError(Problem(message, "ROW_TOO_LONG", ("overlong", "max_len")))
    refuse_nothing_left(report, report.kept, files)
