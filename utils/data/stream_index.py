"""Indexes data files for streaming: counts their rows in one pass and notes where each chunk of rows begins.

An index takes 24 bytes for each 256 rows. It is stored beside the prepared rows of other runs, so that a run that is
resumed, or another process, does not count again.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from loguru import logger

from utils.data.cache import cache_folder, locked
from utils.data.files import raw_rows
from utils.data.json_rows import RawRow, has_a_row_a_line, kind_of_file
from utils.data.tables import header_problem, without_padding
from utils.runtime.errors import Problem, UserError

CHUNK_ROWS = 256  # of a file whose rows can be found one by one
MAX_SEQUENTIAL_BYTES = 32 << 20  # of a file that can only be read from its start, which is one chunk
_LARGE = 2_000_000_000  # bytes; counting takes seconds
_INDEX_VERSION = 2
_PARTS, _PART_BYTES = 64, 4096  # of a file, which its fingerprint covers

LINES, ROW_GROUPS, BATCHES, SEQUENTIAL = "lines", "row groups", "record batches", "sequential"


@dataclass
class FileIndex:
    """Where the chunks of a file are.

    Attributes:
        file: its path.
        how: `LINES`, `ROW_GROUPS` (Parquet), `BATCHES` (Arrow), or `SEQUENTIAL` for a file that is one chunk.
        rows: number of rows of each chunk, [chunks].
        places: of each chunk the byte offset, the number of the row group, or the first row, [chunks].
        lines: the line of each chunk's first row, [chunks].
        status: size in bytes and time of the last change in ns, by which a change during the training is noticed.
    """

    file: str
    how: str
    rows: numpy.ndarray
    places: numpy.ndarray
    lines: numpy.ndarray
    status: tuple[int, int]

    def read(self, chunk: int) -> "Chunk":
        """Reads a chunk.

        Raises:
            UserError: the file has changed since it was indexed.
        """
        if file_status(self.file) != self.status:
            raise UserError(
                f"{self.file!r} was changed while it was read (--streaming true); start again once no other program "
                "writes to it"
            )
        if self.how == LINES:
            end = int(self.places[chunk + 1]) if chunk + 1 < len(self.places) else self.status[0]
            return _Lines(self.file, int(self.places[chunk]), end, int(self.lines[chunk]))
        if self.how == SEQUENTIAL:
            return list(raw_rows(self.file))
        table = _read_table(self, chunk)
        return _Table(self.file, table, int(self.lines[chunk]))


class _Lines:
    """The lines of a part of a file of JSON Lines, as bytes until one is asked for."""

    def __init__(self, file: str, start: int, end: int, line: int):
        with open(file, "rb") as opened:
            opened.seek(start)
            lines = opened.read(end - start).splitlines()  # of bytes: at \n, \r\n and \r alone
        self._rows = [(line + i, text) for i, text in enumerate(lines) if not _is_blank(text, start + i == 0)]
        self._file, self._encoding = file, "utf-8-sig" if start == 0 else "utf-8"

    def __getitem__(self, place: int) -> RawRow:
        line, text = self._rows[place]
        return RawRow(self._file, line, text.decode(self._encoding, "surrogateescape"), unparsed=True)


class _Table:
    """The rows of a part of a Parquet or Arrow file, as an Arrow table until one is asked for."""

    def __init__(self, file: str, table, line: int):
        self._file, self._table, self._line = file, table, line

    def __getitem__(self, place: int) -> RawRow:
        (value,) = self._table.slice(place, 1).to_pylist()
        return RawRow(self._file, self._line + place, without_padding(value))


Chunk = _Lines | _Table | list[RawRow]


def file_status(file: str) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns."""
    status = Path(file).stat()
    return status.st_size, status.st_mtime_ns


def fingerprint(file: str) -> str:
    """A hash of a file's size and of 64 parts of 4 KB, spread evenly from its head to its tail.

    All of a file of 100 GB would take minutes. A change between the parts that keeps the size is not noticed.
    """
    size = Path(file).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as opened:
        for part in range(_PARTS):
            opened.seek(max(0, size - _PART_BYTES) * part // (_PARTS - 1))
            digest.update(opened.read(_PART_BYTES))
    return digest.hexdigest()


def index_files(files: list[str], flag: str, cache_dir: str | None) -> list[FileIndex]:
    """Indexes files, or reads their indices where they are stored.

    Raises:
        UserError: with each file that cannot be streamed.
    """
    found, problems = [], []
    for file in files:
        try:
            found.append(_load_or_index(file, cache_dir))
        except UserError as error:
            problems += [Problem(f"{flag} {problem}", flags=(flag.removeprefix("--"),)) for problem in error.problems]
    if problems:
        raise UserError(*problems)
    return found


def _load_or_index(file: str, cache_dir: str | None) -> FileIndex:
    status = file_status(file)
    key = hashlib.sha256(json.dumps([_INDEX_VERSION, CHUNK_ROWS, *status, fingerprint(file)]).encode()).hexdigest()
    stored = cache_folder(cache_dir, [file], key).with_suffix(".index.npz")
    with locked(stored):
        try:
            with numpy.load(stored) as arrays:
                return FileIndex(file, str(arrays["how"]), arrays["rows"], arrays["places"], arrays["lines"], status)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # there is none, or it is damaged
            if status[0] > _LARGE:
                logger.info("counting the rows of {} ({:,.0f} GB), once", file, status[0] / 1e9)
            index = _index(file, status)
        try:
            part = stored.with_suffix(".part.npz")
            numpy.savez(part, how=index.how, rows=index.rows, places=index.places, lines=index.lines)
            part.replace(stored)
        except OSError as error:
            logger.warning("the index of {} cannot be kept in {}: {}", file, stored.parent, error)
        return index


def _index(file: str, status: tuple[int, int]) -> FileIndex:
    kind, how = kind_of_file(file), SEQUENTIAL
    if kind == ".parquet":
        how, chunks = ROW_GROUPS, _parquet_chunks(file)
    elif kind == ".arrow":
        how, chunks = BATCHES, _arrow_chunks(file)
    elif Path(file).suffix.lower() in (".jsonl", ".json") and _has_rows_in_lines(file, status[0]):
        how, chunks = LINES, _line_chunks(file)
    elif status[0] <= MAX_SEQUENTIAL_BYTES:
        chunks = _sequential_chunk(file)
    else:
        raise UserError(
            f"{file!r} has {status[0] / 1e6:,.0f} MB and can only be read from its start; --streaming true reads such "
            f"a file up to {MAX_SEQUENTIAL_BYTES >> 20} MB. Save it as Parquet, or uncompressed with a row a line "
            "(.jsonl) that \\n ends"
        )
    rows, places, lines = numpy.array(list(chunks), dtype=numpy.int64).reshape(-1, 3).T
    return FileIndex(file, how, rows, places, lines, status)


def _has_rows_in_lines(file: str, size: int) -> bool:
    """As `has_a_row_a_line`, which would read a large array into memory if it is all of a line."""
    with open(file, "rb") as opened:
        if size > MAX_SEQUENTIAL_BYTES and b"\n" not in opened.read(MAX_SEQUENTIAL_BYTES):
            return False
    return has_a_row_a_line(file)


def _line_chunks(file: str) -> Iterator[tuple[int, int, int]]:
    """Yields (rows, byte offset, first line) of each chunk of a file with a row a line."""
    rows, offset, start, first = 0, 0, 0, 1
    with open(file, "rb") as opened:
        for number, line in enumerate(_lines_of(opened), 1):
            if rows == CHUNK_ROWS:
                yield rows, start, first
                rows, start, first = 0, offset, number
            rows += not _is_blank(line, offset == 0)
            offset += len(line)
    if rows:
        yield rows, start, first


def _lines_of(opened) -> Iterator[bytes]:
    """Yields the lines of a binary file with their ends `\\n`, `\\r\\n` and `\\r`, as of a text file."""
    for line in opened:
        if b"\r" in line and b"\r" in line.removesuffix(b"\n").removesuffix(b"\r"):
            yield from line.splitlines(keepends=True)
        else:
            yield line


def _is_blank(line: bytes, at_start: bool) -> bool:
    """Whether a line has only white space, also of Unicode; `at_start`, a byte-order mark is no part of it."""
    if line.startswith(b"{"):  # nearly all, and decoding takes time
        return False
    return not line.decode("utf-8-sig" if at_start else "utf-8", "surrogateescape").strip()


def _parquet_chunks(file: str) -> Iterator[tuple[int, int, int]]:
    """Yields (rows, row group, first line) of each row group, which Parquet reads in one piece."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            _check_header(file, opened.schema_arrow.names)
            first = 1
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                if rows:
                    yield rows, group, first
                first += rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file!r} is not a whole Parquet file ({error})") from error


def _arrow_chunks(file: str) -> Iterator[tuple[int, int, int]]:
    """Yields (rows, first row, first line) of slices of an Arrow file, which is mapped into memory."""
    import pyarrow

    try:
        table = _map_arrow(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file!r} is not a whole Arrow file ({error})") from error
    _check_header(file, table.column_names)
    for start in range(0, table.num_rows, CHUNK_ROWS):
        yield min(CHUNK_ROWS, table.num_rows - start), start, start + 1


def _sequential_chunk(file: str) -> Iterator[tuple[int, int, int]]:
    rows = 0
    for row in raw_rows(file):
        rows += 1
        if row.fatal:
            raise UserError(f"{file!r} line {row.line} {row.problem}")
    if rows:
        yield rows, 0, 1


def _check_header(file: str, names: list[str]) -> None:
    if problem := header_problem(names):
        raise UserError(f"{file!r} {problem}")


def _map_arrow(file: str):
    """An Arrow file, in the stream or the file format, as a table that is mapped rather than read."""
    import pyarrow
    import pyarrow.ipc

    source = pyarrow.memory_map(file)
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source).read_all()


_opened: dict[tuple[str, tuple[int, int]], object] = {}  # files that this process reads: Parquet's footer, Arrow's map


def _read_table(index: FileIndex, chunk: int):
    """A chunk of a Parquet or Arrow file as an Arrow table."""
    import pyarrow.parquet

    key, place = (index.file, index.status), int(index.places[chunk])
    if index.how == BATCHES:
        if key not in _opened:
            _opened[key] = _map_arrow(index.file)
        return _opened[key].slice(place, int(index.rows[chunk]))
    if key not in _opened:
        _opened[key] = pyarrow.parquet.read_metadata(index.file)
    with pyarrow.parquet.ParquetFile(index.file, metadata=_opened[key]) as opened:
        return opened.read_row_group(place, use_threads=False)
