"""Streams rows: they are read, checked, rendered and tokenised while the training runs, and none is stored.

`datasets.IterableDataset` is not used. Its shuffle buffer is lost on a resume, its order depends on the number of
workers, and it has no length. Here rows are found by number through an index of the files, so that the order is a
function of seed and epoch (`RowOrder`), a position in it is one number, and transformers' own loop divides rows among
processes and workers, counts steps and ends epochs.

A row that is dropped leaves its place in the step empty, so the number of steps is known before any row is read.
"""

import dataclasses
import hashlib
from collections import OrderedDict
from typing import Any

import numpy
from loguru import logger

from utils.data.bad_rows import RefusedRow, format_refused
from utils.data.cache import hash_settings, rows_key, without_unused_weights
from utils.data.encode import EncodedChunk, RowEncoder, encode_chunk
from utils.data.files import files_left_out, find_files
from utils.data.mixture import order_seed
from utils.data.parallel import Chunk
from utils.data.places import decode_source
from utils.data.report import TOO_LONG, DataReport, refuse_nothing_left
from utils.data.stream_index import FileIndex, fingerprint, index_files
from utils.runtime.distributed import all_gather_objects
from utils.runtime.errors import Problem, UserError

SAMPLE_ROWS = 1000  # checked before the training: of each file the first, as many of each
STREAM_REPORT = "stream_report"  # of a batch: what became of its rows, a list of EncodedChunk without their rows


class RowOrder:
    """The order of the rows of an epoch, a function of seed and epoch that needs no earlier rows.

    Chunks are permuted, consecutive ones form groups of about `buffer` rows, and the rows of a group are permuted.

    `RowOrder([2, 2, 2], buffer=4, seed=0).rows(0, 6)` → `[5, 2, 4, 3, 1, 0]`, for example

    Args:
        sizes: number of rows of each chunk, [chunks].
        buffer: rows of a group; None for the order of the files.
        seed: of the order.
    """

    def __init__(self, sizes, buffer: int | None, seed: int):
        self._sizes, self._buffer, self._seed = numpy.asarray(sizes, dtype=numpy.int64), buffer, seed
        self._first = numpy.concatenate([[0], numpy.cumsum(self._sizes)])  # number of each chunk's first row
        self.set_epoch(0)

    def __len__(self) -> int:
        return int(self._first[-1])

    def set_epoch(self, epoch: int) -> None:
        """Draws the order of the chunks for an epoch."""
        self._epoch, self._group = epoch, (-1, None)
        if self._buffer is None:
            return
        self._chunks = numpy.random.default_rng([self._seed, epoch]).permutation(len(self._sizes))
        before = numpy.cumsum(self._sizes[self._chunks]) - self._sizes[self._chunks]
        numbers = before // self._buffer
        self._groups = numpy.flatnonzero(numpy.diff(numbers, prepend=-1))  # index of each group's first chunk
        self._positions = before[self._groups]

    def rows(self, start: int, stop: int) -> list[int]:
        """The numbers of the rows at the positions from `start` to before `stop`."""
        stop = min(stop, len(self))
        if self._buffer is None:
            return list(range(start, stop))
        found: list[int] = []
        while start < stop:
            group = int(numpy.searchsorted(self._positions, start, side="right")) - 1
            rows = self._rows_of(group)[start - self._positions[group] :][: stop - start]
            found += rows.tolist()
            start += len(rows)
        return found

    def largest_group(self) -> int:
        """How many chunks may be read in turn: those of the largest group, at most, in any epoch."""
        if self._buffer is None:
            return 1
        return int(numpy.searchsorted(numpy.cumsum(numpy.sort(self._sizes)), self._buffer)) + 1

    def _rows_of(self, group: int) -> numpy.ndarray:
        if self._group[0] != group:
            chunks = self._chunks[self._groups[group] :]
            if group + 1 < len(self._groups):
                chunks = chunks[: self._groups[group + 1] - self._groups[group]]
            rows = numpy.concatenate([numpy.arange(self._first[i], self._first[i + 1]) for i in chunks])
            shuffled = numpy.random.default_rng([self._seed, self._epoch, group]).permutation(rows)
            self._group = (group, shuffled)
        return self._group[1]


class RowStream:
    """Rows by their number in the files, encoded when they are asked for; torch's map-style dataset.

    Args:
        indices: of the files, in their order.
        encoder: how the task reads and encodes rows.
        on_bad_row: as in CommonArgs.
        order: of the rows, which decides how many chunks are kept in memory.
        report: is filled with what became of the rows of the first epoch.

    Attributes:
        empty: the row in the place of one that is dropped, and of number `len(self)`, which fills up the last step.
        sample: the first rows, prepared; a datasets.Dataset. `sample_report` is theirs.
        schema: of prepared rows, a pyarrow.Schema.
    """

    empty: dict = {}
    sample: Any = None
    sample_report: DataReport
    schema: Any = None

    def __init__(
        self, indices: list[FileIndex], encoder: RowEncoder, on_bad_row: str, order: RowOrder, report: DataReport
    ):
        self._indices, self.encoder, self.on_bad_row = indices, encoder, on_bad_row
        self.order, self.report = order, report
        self._chunk_file = numpy.repeat(numpy.arange(len(indices)), [len(index.rows) for index in indices])
        self._file_chunk = numpy.cumsum([0, *(len(index.rows) for index in indices)])  # each file's first chunk
        self._first = numpy.concatenate([[0], numpy.cumsum(chunk_sizes(indices))])
        self._chunks: OrderedDict[int, Any] = OrderedDict()  # the last chunks used
        self._max_chunks = order.largest_group() + 1

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitems__(self, numbers: list[int]) -> list[dict]:
        """The rows of a batch; the first also has the key STREAM_REPORT."""
        try:
            rows, reports = self.encode([number for number in numbers if number < len(self)])
        except (UserError, OSError) as error:  # reported by the trainer, where all processes stop together
            problems = error.problems if isinstance(error, UserError) else [error]
            rows, reports = {}, [EncodedChunk("", 0, refused=[RefusedRow("", 0, str(problem)) for problem in problems])]
        found = [rows.get(number, self.empty) for number in numbers]
        return [{**found[0], STREAM_REPORT: reports}, *found[1:]]

    def encode(self, numbers: list[int]) -> tuple[dict[int, dict], list[EncodedChunk]]:
        """Encodes rows.

        Returns:
            number → row of those that are kept, and what became of all of them, without their rows.
        """
        raw_rows: dict[int, dict] = {}
        for number in numbers:
            file, row = self._read(number)
            raw_rows.setdefault(file, {})[row.line] = (number, row)
        found, reports = {}, []
        for file, rows in raw_rows.items():
            chunk = Chunk(file, self._indices[file].file, [row for _, row in rows.values()])
            encoded = encode_chunk(self.encoder, self.on_bad_row, chunk)
            kept = encoded.batch.to_pylist() if encoded.batch is not None else []
            self.schema = encoded.batch.schema if kept else self.schema
            found |= {rows[decode_source(row["source"][0])[1]][0]: row for row in kept}
            reports.append(dataclasses.replace(encoded, batch=None))
            if not encoded.refused and len(kept) + len(encoded.dropped) != encoded.rows:
                raise RuntimeError(f"of {encoded.rows} rows, {len(kept)} are kept, {len(encoded.dropped)} dropped")
        return found, reports

    def _read(self, number: int) -> tuple[int, Any]:
        """The index of a row's file, and the raw row."""
        chunk = int(numpy.searchsorted(self._first, number, side="right")) - 1
        file = int(self._chunk_file[chunk])
        if chunk not in self._chunks:
            while len(self._chunks) >= self._max_chunks:
                self._chunks.popitem(last=False)
            self._chunks[chunk] = self._indices[file].read(chunk - int(self._file_chunk[file]))
        self._chunks.move_to_end(chunk)
        return file, self._chunks[chunk][number - int(self._first[chunk])]

    def first_numbers(self, rows: int) -> list[int]:
        """The numbers of the first rows of all files, as many of each."""
        starts = self._first[self._file_chunk]
        each = max(1, rows // len(self._indices))
        pairs = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        return [number for start, end in pairs for number in range(start, min(end, start + each))][:rows]


def chunk_sizes(indices: list[FileIndex]) -> numpy.ndarray:
    """The number of rows of each chunk of all files, [chunks]."""
    return numpy.concatenate([index.rows for index in indices])


def load_stream(args, train_args, encoder: RowEncoder) -> tuple[RowStream, DataReport]:
    """Indexes the files of `--train_data_path` and checks their first rows.

    Returns:
        the rows, and their report, which is complete after the training.

    Raises:
        UserError: a file is missing or cannot be streamed, or one of the first rows cannot be used.
    """
    flag = "--train_data_path"
    files, problems = find_files(args.train_data_path, flag, encoder.suffixes)
    if problems:
        raise UserError(*problems)
    for note in files_left_out(args.train_data_path, flag, encoder.suffixes):
        logger.info("{}", note)
    indices = index_files(files, flag, args.cache_dir)
    report = _report(files, indices, encoder)
    if len(set(all_gather_objects([report.key]))) > 1:
        raise UserError(f"{flag}: the processes have read different files; give each machine the same files")
    refuse_nothing_left(DataReport(), report.rows, files)
    sizes, shuffled = chunk_sizes(indices), train_args.train_sampling_strategy == "random"
    order = RowOrder(sizes, args.shuffle_buffer if shuffled else None, order_seed(train_args))
    stream = RowStream(indices, encoder, args.on_bad_row, order, report)
    stream.sample = _sample(stream, files)
    report.key = hash_settings({"rows": report.key, "first": rows_key(stream.sample)}, {})
    group, workers = max(args.shuffle_buffer, int(sizes.max())), train_args.dataloader_num_workers
    logger.info(
        "train data: {:,} rows are streamed, {}, and tokenised {}; a row that is dropped leaves its place in its step "
        "empty, so an epoch always has the same number of steps",
        report.rows,
        f"shuffled in groups of about {group:,}" if shuffled else "in the files' order",
        f"in {workers} workers" if workers else "between the steps (--dataloader_num_workers 2: beside them)",
    )
    return stream, report


def _report(files: list[str], indices: list[FileIndex], encoder: RowEncoder) -> DataReport:
    """The report of rows that are not read yet; its key identifies the files, their order and their encoding.

    No version is in it, so that a run can be resumed after an update, as one of prepared rows can; whether that
    encodes rows in another way is seen in the ids of the first rows, which `load_stream` adds to the key.
    """
    sizes, hashes = chunk_sizes(indices), {file: fingerprint(file) for file in files}
    encoding = {**encoder.key, "chunks": hashlib.sha256(sizes.tobytes()).hexdigest()}
    # --on_bad_row and --overlong error decide about single rows, not about their order, and may change on a resume
    if encoding.get("overlong") == "error":
        encoding["overlong"] = "drop"
    rows, key = int(sizes.sum()), hash_settings(encoding, hashes)
    bytes_of = {index.file: index.status[0] for index in indices}
    return DataReport(rows=rows, kept=rows, files=files, hashes=hashes, bytes_of=bytes_of, key=key)


def _sample(stream: RowStream, files: list[str]):
    """Prepares the first rows, which the checks before the training look at; a datasets.Dataset.

    Raises:
        UserError: one of them stops the run, or none is kept.
    """
    import pyarrow
    from datasets import Dataset

    rows, reports = stream.encode(stream.first_numbers(SAMPLE_ROWS))
    raise_refused(reports, stream.encoder)
    report = stream.sample_report = DataReport(files=files)
    for encoded in reports:
        report.add_chunk(encoded)
    missing = set(stream.encoder.renamed).difference(*(encoded.renamed for encoded in reports))
    if missing:
        named = " and ".join(map(repr, sorted(missing)))
        message = f"--columns names {named}, which none of the first {report.rows:,} rows of --train_data_path has"
        raise UserError(Problem(f"{message}; correct the name, or leave it out", flags=("columns",)))
    refuse_nothing_left(report, report.kept, files)
    report.log(f"train data, of which the first {report.rows:,} rows are checked")
    table = pyarrow.Table.from_pylist([rows[number] for number in sorted(rows)], schema=stream.schema)
    return without_unused_weights(Dataset(table))


def raise_refused(reports: list[EncodedChunk], encoder: RowEncoder, how_to_resume: str = "") -> None:
    """Raises a UserError that names the rows which stop the run, if there are any.

    Args:
        reports: what became of some rows.
        encoder: of the rows.
        how_to_resume: the instruction to continue the run; empty before the training.
    """
    refused = [problem for encoded in reports for problem in refused_rows(encoded, encoder)]
    if not refused:
        return
    on = f" To continue with it, {how_to_resume}" if how_to_resume else ""
    message = (
        f"rows cannot be used (--streaming true reads them during the training):{format_refused(refused)}\n"
        f"   Correct them and start anew, or pass --on_bad_row drop (--overlong drop for one that is too long).{on}"
    )
    raise UserError(Problem(message, "ROW_UNREADABLE", ("on_bad_row",)))


def refused_rows(encoded: EncodedChunk, encoder: RowEncoder) -> list[RefusedRow]:
    """The rows of a chunk that stop the run."""
    too_long = encoder.refuse_long and [item for item in encoded.dropped if item[2] == TOO_LONG]
    return encoded.refused + [RefusedRow(encoded.file, line, reason) for line, reason, _ in too_long or ()]
