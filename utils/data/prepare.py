"""Files → checked rows → token ids and labels, prepared once and then read from the cache.

Prepared rows are stored in a folder named by a hash of everything they depend on: the files' content, the template,
the tokenizer, the lengths, the libraries that encode and pack. A later start with the same settings reads them there.
"""

import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path

from loguru import logger

from utils.data.cache import (
    cache_folder,
    check_unchanged,
    content_key,
    load_cached,
    locked,
    rows_key,
    save_arrow_file,
    store,
)
from utils.data.encode import Part, RowKind, encoded_parts
from utils.data.files import files_left_out, find_files
from utils.data.places import MAX_PLACES_SHOWN
from utils.data.report import TOO_LONG, DataReport, refuse_nothing_left
from utils.runtime.distributed import all_gather_objects
from utils.runtime.errors import Problem, UserError, is_disk_error
from utils.storage.files import checksum

_BATCHES = 20  # chunks written together: reading rows loads at least a memory page of every batch


def load_rows(paths: str, flag: str, kind: RowKind, on_bad_row: str, cache_dir: str | None, workers: int | None):
    """Prepares the rows of `paths`, or reads them from the cache.

    Args:
        paths: files, folders, globs, separated by commas.
        flag: the flag that gave them, `--train_data_path` or `--eval_data_path`.
        kind: how the task reads and encodes rows.
        on_bad_row: `auto`, `error` or `drop`, as in CommonArgs.
        cache_dir: the folder of prepared rows; None for the default.
        workers: processes that tokenise; None for a number that the size of the files justifies.

    Returns:
        (datasets.Dataset with the columns of `kind` and `source`, DataReport)

    Raises:
        UserError: a file is missing or was changed while it was read, or rows cannot be used.
    """
    files, problems = find_files(paths, flag, kind.suffixes)
    if problems:
        raise UserError(*problems)
    for note in files_left_out(paths, flag, kind.suffixes):
        logger.info("{}", note)
    checksums = {file: checksum(file) for file in files}
    hashes = {file: sha for file, (sha, _) in checksums.items()}
    name = flag.removeprefix("--").removesuffix("_data_path") + " data"
    dataset, report = _load_or_prepare(name, hashes, kind, on_bad_row, cache_dir, workers)
    report.files, report.hashes = files, hashes
    report.bytes_of = {file: size for file, (_, size) in checksums.items()}
    if len(set(all_gather_objects([report.key]))) > 1:
        raise UserError(f"{flag}: the processes have read different rows; give each machine the same files")
    report.log(name)
    return dataset, report


def _load_or_prepare(
    name: str, hashes: dict[str, str], kind: RowKind, on_bad_row: str, cache_dir: str | None, workers: int | None
):
    """Returns (datasets.Dataset, DataReport) from the cache, where they are put if they are missing.

    Args:
        name: names the data in the log.
        hashes: file → the sha256 of its content.
        kind, on_bad_row, cache_dir, workers: as in `load_rows`.
    """
    files = list(hashes)
    folder = cache_folder(cache_dir, files, content_key(hashes, kind.key, on_bad_row))
    with locked(folder):
        if prepared := load_cached(folder, files):
            logger.info("{}: prepared rows found in {}", name, folder)
            return prepared
        started = time.perf_counter()
        try:
            prepared = _prepare(hashes, kind, on_bad_row, folder, workers)
        except Exception as error:
            if not is_disk_error(error):
                raise
            raise UserError(
                f"prepared rows cannot be kept in {str(folder.parent)!r}: {error}; free some space, or pass another "
                "--cache_dir"
            ) from error
        logger.info("{}: prepared in {:.1f} s, kept in {}", name, time.perf_counter() - started, folder)
        return prepared


def _prepare(hashes: dict[str, str], kind: RowKind, on_bad_row: str, folder: Path, workers: int | None):
    """Reads, checks and encodes the rows in a temporary folder, and moves it into the cache once it is complete.

    Args:
        hashes: file → the sha256 that is part of the folder's name.
        kind, on_bad_row, workers: as in `load_rows`.
        folder: from `cache_folder`.

    Raises:
        UserError: a file changed after it was hashed.
    """
    from datasets import Dataset, load_from_disk

    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
    try:
        report = _write_rows(list(hashes), kind, on_bad_row, scratch / "encoded.arrow", workers)
        check_unchanged(hashes)
        dataset = Dataset.from_file(str(scratch / "encoded.arrow"))
        if kind.pack:
            dataset = kind.pack(dataset)
            dataset.save_to_disk(str(scratch / "rows"))
        else:
            save_arrow_file(dataset, scratch / "encoded.arrow", scratch / "rows")
        report.key = rows_key(dataset)
        del dataset
        store(report, scratch / "rows", folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_from_disk(str(folder)), report


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
        shown = "".join(f"\n     {problem}" for problem in refused[:MAX_PLACES_SHOWN])
        more = f"\n     … and {len(refused) - MAX_PLACES_SHOWN:,} more" if len(refused) > MAX_PLACES_SHOWN else ""
        message = (
            f"{len(refused):,} of {report.rows:,} rows cannot be used:{shown}{more}\n"
            "   Correct them, or pass --on_bad_row drop to train without those that stand alone on a line"
        )
        raise UserError(Problem(message, "ROW_UNREADABLE", ("on_bad_row",)))
    if kind.refuse_long and TOO_LONG in report.dropped:
        message = (
            f"{report.dropped[TOO_LONG]:,} of {report.rows:,} rows are too long, and --overlong error is given:"
            f"{report.named_places()}\n   Raise --max_len, or give --overlong truncate or drop"
        )
        raise UserError(Problem(message, "ROW_TOO_LONG", ("overlong", "max_len")))
    refuse_nothing_left(report, report.kept, files)
