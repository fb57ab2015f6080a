"""Files → checked rows → token ids and labels, prepared once and then read from the cache.

Prepared rows are stored in a folder named by a hash of everything they depend on: the files' content, the template,
the tokenizer, the lengths, the libraries that encode and pack. A later start with the same settings reads them there.
"""

import shutil
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from utils.data.bad_rows import RefusedRow, format_refused
from utils.data.cache import (
    cache_folder,
    check_unchanged,
    content_key,
    load_cached,
    locked,
    rows_key,
    save_arrow_file,
    store,
    without_unused_weights,
)
from utils.data.encode import RowEncoder, encode_files
from utils.data.files import files_left_out, find_files
from utils.data.packing import count_held_back, split_validation
from utils.data.report import TOO_LONG, DataReport, refuse_nothing_left
from utils.data.source_names import name_sources
from utils.data.stream import RowStream, load_stream
from utils.runtime.distributed import all_gather_objects
from utils.runtime.errors import Problem, UserError, is_disk_error
from utils.storage.files import checksum

_BATCHES = 20  # chunks written together: reading rows loads at least a memory page of every batch


@dataclass
class Data:
    """The prepared rows of a run.

    Attributes:
        train, eval: datasets of prepared rows; `eval` is None where nothing is evaluated. With `--streaming true`
            `train` holds the first rows only, for the checks before the training.
        report, eval_report: what preparing the files of `--train_data_path` and `--eval_data_path` resulted in.
        held_back: number of rows of the training files that are for validation (`--val_size`), before packing.
        source_names: what each of `report.files` is a part of, by which losses are split: an entry of
            `--train_data_path`. The column `source` of a row holds the index of its file.
        eval_source_names: the same of the files of the validation rows.
        stream: the rows that are trained on, with `--streaming true`; else None.
        order: the order of each epoch's rows, where it is not the one that the trainer draws: a `Mixture`, or a
            `FixedOrder`.
    """

    train: Any
    eval: Any
    report: DataReport
    eval_report: DataReport | None = None
    held_back: int = 0
    source_names: tuple[str, ...] = ()
    eval_source_names: tuple[str, ...] = ()
    stream: RowStream | None = None
    order: Any = None

    def rows_in_epoch(self) -> int:
        """Counts the rows that an epoch takes, packed ones as one; of a stream also those that will be dropped."""
        if self.order is not None:
            return len(self.order)
        return len(self.train if self.stream is None else self.stream)

    def checked(self) -> DataReport:
        """The report of the rows in `train`, which of a stream are only the first."""
        return self.report if self.stream is None else self.stream.sample_report

    def rows_trained(self) -> int:
        """Counts the rows of the files that are trained on, before packing."""
        return self.report.kept - self.held_back


def load_train_and_eval(args, train_args, encoder: RowEncoder) -> Data:
    """Prepares the rows to train on and those to evaluate on, the latter from `--eval_data_path` or `--val_size`.

    Raises:
        UserError: as `load_rows`; or no training data is given, or `--val_size` leaves none.
    """
    if args.train_data_path is None:
        raise UserError("--train_data_path is missing; give data files")
    options = (encoder, args.on_bad_row, args.cache_dir, getattr(train_args, "dataset_num_proc", None))
    stream = None
    if args.train_data_path == "" and args.eval_data_path:  # of a mixture, whose sources are prepared one by one
        rows, report = load_rows(args.eval_data_path, "--eval_data_path", *options)
        names = name_sources(args.eval_data_path, "--eval_data_path", encoder.suffixes, report.files)
        return Data(rows, rows, report, report, eval_source_names=names)
    if args.streaming:
        stream, report = load_stream(args, train_args, encoder)
        train = stream.sample
    else:
        train, report = load_rows(args.train_data_path, "--train_data_path", *options)
    names = name_sources(args.train_data_path, "--train_data_path", encoder.suffixes, report.files)
    if args.eval_data_path:
        evaluation, eval_report = load_rows(args.eval_data_path, "--eval_data_path", *options)
        eval_names = name_sources(args.eval_data_path, "--eval_data_path", encoder.suffixes, eval_report.files)
        return Data(train, evaluation, report, eval_report, 0, names, eval_names, stream)
    if not args.val_size:
        return Data(train, None, report, source_names=names, stream=stream)
    held_back = count_held_back(args.val_size, report.kept)
    logger.info("{:,} of {:,} rows are held back for validation", held_back, report.kept)
    return Data(*split_validation(train, args.val_size, train_args.seed), report, None, held_back, names, names)


def load_rows(paths: str, flag: str, encoder: RowEncoder, on_bad_row: str, cache_dir: str | None, workers: int | None):
    """Prepares the rows of `paths`, or reads them from the cache.

    Args:
        paths: files, folders, globs, separated by commas.
        flag: the flag that gave them, `--train_data_path` or `--eval_data_path`.
        encoder: how the task reads and encodes rows.
        on_bad_row: `auto`, `error` or `drop`, as in CommonArgs.
        cache_dir: the folder of prepared rows; None for the default.
        workers: processes that tokenise; None for a number that the size of the files justifies.

    Returns:
        (datasets.Dataset with the columns of `encoder` and `source`, DataReport)

    Raises:
        UserError: a file is missing or was changed while it was read, or rows cannot be used.
    """
    files, problems = find_files(paths, flag, encoder.suffixes)
    if problems:
        raise UserError(*problems)
    for note in files_left_out(paths, flag, encoder.suffixes):
        logger.info("{}", note)
    checksums = {file: checksum(file) for file in files}
    hashes = {file: sha for file, (sha, _) in checksums.items()}
    name = flag.removeprefix("--").removesuffix("_data_path") + " data"
    dataset, report = _load_or_prepare(name, hashes, encoder, on_bad_row, cache_dir, workers)
    report.files, report.hashes = files, hashes
    report.bytes_of = {file: size for file, (_, size) in checksums.items()}
    if len(set(all_gather_objects([report.key]))) > 1:
        raise UserError(f"{flag}: the processes have read different rows; give each machine the same files")
    _check_columns(report, flag)
    if flag == "--train_data_path":
        report.leave_out_unread(encoder.also_read)
    report.log(name)
    return dataset, report


def _check_columns(report: DataReport, flag: str) -> None:
    """Refuses a field of `--columns` that no training row has; validation rows may lack an optional one."""
    if not report.missing_columns:
        return
    names = " and ".join(map(repr, report.missing_columns))
    message = f"--columns names {names}, which no row of {flag} has"
    if flag == "--train_data_path":
        raise UserError(Problem(f"{message}; correct the name, or leave it out", flags=("columns",)))
    logger.warning("{}", message)


def _load_or_prepare(
    name: str, hashes: dict[str, str], encoder: RowEncoder, on_bad_row: str, cache_dir: str | None, workers: int | None
):
    """Returns (datasets.Dataset, DataReport) from the cache, where they are put if they are missing.

    Args:
        name: names the data in the log.
        hashes: file → the sha256 of its content.
        encoder, on_bad_row, cache_dir, workers: as in `load_rows`.
    """
    files = list(hashes)
    folder = cache_folder(cache_dir, files, content_key(hashes, encoder.key, on_bad_row))
    with locked(folder):
        if prepared := load_cached(folder, files):
            logger.info("{}: prepared rows found in {}", name, folder)
            return prepared
        started = time.perf_counter()
        try:
            prepared = _prepare(hashes, encoder, on_bad_row, folder, workers)
        except Exception as error:
            if not is_disk_error(error):
                raise
            raise UserError(
                f"prepared rows cannot be kept in {str(folder.parent)!r}: {error}; free some space, or pass another "
                "--cache_dir"
            ) from error
        logger.info("{}: prepared in {:.1f} s, kept in {}", name, time.perf_counter() - started, folder)
        return prepared


def _prepare(hashes: dict[str, str], encoder: RowEncoder, on_bad_row: str, folder: Path, workers: int | None):
    """Reads, checks and encodes the rows in a temporary folder, and moves it into the cache once it is complete.

    Args:
        hashes: file → the sha256 that is part of the folder's name.
        encoder, on_bad_row, workers: as in `load_rows`.
        folder: from `cache_folder`.

    Raises:
        UserError: a file changed after it was hashed.
    """
    from datasets import Dataset, load_from_disk

    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
    try:
        report = _write_rows(list(hashes), encoder, on_bad_row, scratch / "encoded.arrow", workers)
        check_unchanged(hashes)
        dataset = Dataset.from_file(str(scratch / "encoded.arrow"))
        if encoder.pack:
            dataset = encoder.pack(without_unused_weights(dataset))
            dataset.save_to_disk(str(scratch / "rows"))
        else:
            save_arrow_file(dataset, scratch / "encoded.arrow", scratch / "rows")
        report.key = rows_key(without_unused_weights(dataset))
        report.files = list(hashes)
        del dataset
        store(report, scratch / "rows", folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return without_unused_weights(load_from_disk(str(folder))), report


def _write_rows(files: list[str], encoder: RowEncoder, on_bad_row: str, path: Path, workers: int | None) -> DataReport:
    """Writes the encoded rows to an Arrow file, chunk by chunk.

    Raises:
        UserError: naming the rows that stop the run by file and line, at most 20 reasons.
    """
    import pyarrow
    from datasets.arrow_writer import ArrowWriter

    report, refused, batches, renamed = DataReport(), [], [], set()

    def write():
        rows = pyarrow.Table.from_batches(batches)
        writer.write_table(rows, writer_batch_size=rows.num_rows)
        batches.clear()

    with ArrowWriter(path=str(path)) as writer, closing(encode_files(files, encoder, on_bad_row, workers)) as chunks:
        for encoded in chunks:
            report.add_chunk(encoded)
            refused += encoded.refused
            renamed |= encoded.renamed
            if encoded.batch is not None and not refused:
                batches.append(encoded.batch)
            if len(batches) == _BATCHES:
                write()
        report.missing_columns = [name for name in encoder.renamed if name not in renamed]
        _refuse(refused, report, encoder, files)
        if batches:
            write()
        writer.finalize()
    return report


def _refuse(refused: list[RefusedRow], report: DataReport, encoder: RowEncoder, files: list[str]) -> None:
    if refused:
        message = (
            f"{len(refused):,} of {report.rows:,} rows cannot be used:{format_refused(refused)}\n"
            "   Correct them, or pass --on_bad_row drop to train without those that stand alone on a line"
        )
        raise UserError(Problem(message, "ROW_UNREADABLE", ("on_bad_row",)))
    if encoder.refuse_long and TOO_LONG in report.dropped:
        message = (
            f"{report.dropped[TOO_LONG]:,} of {report.rows:,} rows are too long, and --overlong error is given:"
            f"{report.named_places()}\n   Raise --max_len, or give --overlong truncate or drop"
        )
        raise UserError(Problem(message, "ROW_TOO_LONG", ("overlong", "max_len")))
    refuse_nothing_left(report, report.kept, files)
