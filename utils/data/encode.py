"""Encodes raw rows: each chunk is parsed, checked, rendered and tokenised in one pass."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from utils.data.conversations import BadRow, EmptyRow
from utils.data.files import RawRow, parse_row
from utils.data.parallel import Chunk, map_chunks
from utils.data.places import encode_source
from utils.data.report import Dropped
from utils.data.row_types import IDS, LABELS, arrow_type
from utils.data.turns import BrokenUnicode, unreadable
from utils.template.messages import UNTRAINED_ANSWER
from utils.template.tokenize import IGNORE_INDEX


@dataclass(frozen=True)
class RowKind:
    """How the rows of a run are read and encoded.

    Attributes:
        suffixes: of the files it reads.
        read: raw row → what `encode` takes; raises BadRow or EmptyRow.
        encode: list of what `read` returned → for each its columns, `shortened`, `notes`, or why it is dropped.
        key: everything that `encode` depends on, for the cache.
        columns: name → kind of each column, as in `RowType`.
        pack: encoded dataset → packed dataset; None to leave it as it is.
        refuse_long: whether a row that is too long is an error.
        unread: raw row → names of the fields that are not read, for the log.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Any], Any]
    encode: Callable[[list[Any]], list[dict | Dropped]]
    key: dict[str, Any]
    columns: dict[str, str] = field(default_factory=lambda: {"input_ids": IDS, "labels": LABELS})
    pack: Callable[[Any], Any] | None = None
    refuse_long: bool = False
    unread: Callable[[Any], list[str]] = lambda row: []


@dataclass
class Part:
    """The result of encoding one chunk.

    Attributes:
        rows: number of rows in the chunk.
        batch: the kept rows as a pyarrow RecordBatch; None if there are none.
        dropped: line, reason and kind of each dropped row.
        shortened: lines of truncated rows.
        untrained: line and reason of each answer in a kept row that is not trained.
        refused: a description of each row that stops the run.
        unread: name of a field that is not read → number of rows with it.
    """

    file: str
    rows: int
    batch: Any = None
    tokens: int = 0
    trained_tokens: int = 0
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    shortened: list[int] = field(default_factory=list)
    untrained: list[tuple[int, str]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)


def encode_chunk(kind: RowKind, on_bad_row: str, chunk: Chunk) -> Part:
    """Parses, checks and encodes one chunk of rows."""
    part, lines, values = Part(chunk.file, len(chunk.rows)), [], []
    for raw in chunk.rows:
        try:
            raw = parse_row(raw)
            value = _checked(kind, raw)
            part.unread.update(kind.unread(raw.value))
        except EmptyRow as error:
            if on_bad_row == "error":
                part.refused.append(f"{chunk.file}:{raw.line} {error}")
            part.dropped.append((raw.line, str(error), error.kind))
        except BadRow as error:
            # the rows after a fatal one cannot be counted, so it stops the run in any case
            if on_bad_row != "drop" or raw.fatal:
                part.refused.append(f"{chunk.file}:{raw.line} {error}")
            part.dropped.append((raw.line, str(error), error.kind))
        else:
            lines.append(raw.line)
            values.append(value)
    if values and not (chunk.check_only or part.refused):
        _encode(kind, chunk.number, lines, values, part)
    return part


def _checked(kind: RowKind, raw: RawRow):
    if raw.problem:
        raise unreadable(raw)
    value = kind.read(raw.value)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BrokenUnicode("has half a Unicode character (a lone surrogate)") from None
    return value


def _encode(kind: RowKind, number: int, lines: list[int], values: list, part: Part) -> None:
    import pyarrow

    kept, sources = [], []
    for line, row in zip(lines, kind.encode(values), strict=True):
        if isinstance(row, Dropped):
            part.dropped.append((line, row.reason, row.kind))
            continue
        kept.append(row)
        sources.append([encode_source(number, line)])
        if row["shortened"]:
            part.shortened.append(line)
        for note in row.get("notes", ()):
            if note.kind == UNTRAINED_ANSWER:
                part.untrained.append((line, note.reason))
            else:
                part.unread[note.reason] += 1
        for name, column in kind.columns.items():
            if column == IDS:
                part.tokens += len(row[name])
            elif column == LABELS:
                part.trained_tokens += len(row[name]) - row[name].count(IGNORE_INDEX)
    if kept:
        columns = kind.columns.items()
        arrays = [pyarrow.array([row[name] for row in kept], arrow_type(column)) for name, column in columns]
        arrays.append(pyarrow.array(sources, pyarrow.list_(pyarrow.int64())))
        part.batch = pyarrow.record_batch(arrays, [*kind.columns, "source"])


def encoded_parts(files: list[str], kind: RowKind, on_bad_row: str, workers: int | None) -> Iterator[Part]:
    """Encodes the rows of all files, a chunk at a time, in the files' order.

    Args:
        files: paths of data files.
        kind: how the task reads and encodes them.
        on_bad_row: `auto`, `error` or `drop`, as in CommonArgs.
        workers: processes; None for a number that the size of the files justifies.

    Raises:
        UserError: a process was killed.
    """
    refused: list[str] = []
    work = functools.partial(encode_chunk, kind, on_bad_row)
    # once a row stops the run, the remaining rows are only checked
    for part in map_chunks(work, files, workers, "tokenising", check_only=lambda: bool(refused)):
        refused.extend(part.refused)
        kept, dropped = part.batch.num_rows if part.batch else 0, len(part.dropped)
        if not refused and kept + dropped != part.rows:
            raise RuntimeError(f"of {part.rows} rows, {kept} are kept and {dropped} dropped")
        yield part
