"""Raw rows → token ids and labels, in one pass: parsed, checked, rendered and tokenised a chunk at a time.

Where there are rows enough, several processes take chunks in turn; this one reads the files and writes what comes
back, in order. What is in memory is a few chunks, however many rows there are.
"""

import functools
import json
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from utils.data.conversations import BadRow, EmptyRow
from utils.data.files import RawRow, count_rows, parse_row, raw_rows
from utils.data.report import Dropped, source_of
from utils.data.turns import BrokenUnicode, unreadable
from utils.runtime.errors import UserError
from utils.template.messages import UNTRAINED
from utils.template.tokenize import IGNORED

CHUNK = 1000  # rows tokenised at once
BYTES_A_WORKER = 2 << 20  # of the files; for less than that another process is not worth its start


@dataclass(frozen=True)
class RowKind:
    """How a task reads and encodes its rows.

    Attributes:
        suffixes: the kinds of file it reads.
        read: raw row → what `encode` takes; raises BadRow or EmptyRow.
        encode: what was read → for each its columns, `shortened` and `notes`, or why it is dropped.
        key: everything `encode` depends on, for the cache.
        columns: lists of token ids, named `…ids`, and of labels, named `…labels`, -100 where nothing is trained.
        pack: what is done with the whole encoded dataset at the end, if anything.
        refuse_long: whether a row that is too long stops the run.
        unread: raw row → the names of its fields that are not read, to be named in the log.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Any], Any]
    encode: Callable[[list[Any]], list[dict | Dropped]]
    key: dict[str, Any]
    columns: tuple[str, ...] = ("input_ids", "labels")
    pack: Callable[[Any], Any] | None = None
    refuse_long: bool = False
    unread: Callable[[Any], list[str]] = lambda row: []


class Chunk(NamedTuple):
    """Some rows of one file.

    Attributes:
        number: the file's place among the files.
        check_only: nothing will be trained, but every bad row is to be named.
    """

    number: int
    file: str
    rows: list[RawRow]
    check_only: bool = False


@dataclass
class Part:
    """What became of a chunk.

    Attributes:
        rows: how many it had.
        batch: the columns of those that are kept, a pyarrow RecordBatch; None where there are none.
        dropped: line, reason, kind of each that is left out.
        shortened: lines.
        untrained: line and reason of each answer that is not trained, of the rows that are kept.
        refused: what is wrong with each row that stops the run.
        unread: field → how many rows have it without its being read.
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
    """Does all that has to be done with some rows."""
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
            # rows that follow a fatal one are lost uncounted, so it stops the run in any case
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
        sources.append([source_of(number, line)])
        if row["shortened"]:
            part.shortened.append(line)
        for note in row.get("notes", ()):
            if note.kind == UNTRAINED:
                part.untrained.append((line, note.reason))
            else:
                part.unread[note.reason] += 1
        for name in kind.columns:
            if name.endswith("ids"):
                part.tokens += len(row[name])
            else:
                part.trained_tokens += len(row[name]) - row[name].count(IGNORED)
    if kept:
        arrays = [pyarrow.array([row[name] for row in kept], pyarrow.list_(pyarrow.int32())) for name in kind.columns]
        arrays.append(pyarrow.array(sources, pyarrow.list_(pyarrow.int64())))
        part.batch = pyarrow.record_batch(arrays, [*kind.columns, "source"])


def workers_for(files: list[str]) -> int:
    """How many processes are worth their start."""
    size = sum(Path(file).stat().st_size for file in files)
    return min(os.cpu_count() or 1, 16, size // BYTES_A_WORKER)


def encoded_parts(files: list[str], kind: RowKind, on_bad_row: str, workers: int | None) -> Iterator[Part]:
    """Encodes all rows, in the files' order, with a progress bar where it takes long.

    Args:
        kind: how the task reads and encodes them.
        on_bad_row: `auto`, `error` or `drop`, as in CommonArgs.
        workers: processes; None for a number that suits.

    Raises:
        UserError: a process was killed.
    """
    from tqdm import tqdm

    workers = workers_for(files) if workers is None else workers
    refused = False

    def chunks() -> Iterator[Chunk]:
        for number, file in enumerate(files):
            rows = iter(raw_rows(file))
            while some := list(islice(rows, CHUNK)):
                # once a row stops the run, the rest is only looked through for others that do
                yield Chunk(number, file, some, check_only=refused)

    work = functools.partial(encode_chunk, kind, on_bad_row)
    # not `map`, which would end quietly, and lose rows, at a StopIteration from within the work
    parts = in_processes(work, chunks(), workers) if workers > 1 else (work(chunk) for chunk in chunks())
    total = count_rows(files)
    few = total is not None and total < 5 * CHUNK
    with tqdm(total=total, unit=" rows", desc="tokenising", disable=few, leave=False) as bar:
        for part in parts:
            bar.update(part.rows)
            refused = refused or bool(part.refused)
            kept, dropped = part.batch.num_rows if part.batch else 0, len(part.dropped)
            if not refused and kept + dropped != part.rows:
                raise RuntimeError(f"of {part.rows} rows, {kept} are kept and {dropped} dropped")
            yield part


_work: Callable[[Chunk], Any] | None = None  # in a worker: what it does


def _start_worker(work: Callable[[Chunk], Any]) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would wait for its next chunk forever."""
    while os.getppid() == parent:
        threading.Event().wait(0.5)
    os._exit(1)


def _do_work(chunk: Chunk):
    return _work(chunk)


def in_processes(work: Callable[[Chunk], Any], chunks: Iterator[Chunk], workers: int) -> Iterator[Any]:
    """As `map(work, chunks)`, in so many processes, a few chunks ahead.

    Raises:
        UserError: one of them was killed.
    """
    import multiprocessing

    context = multiprocessing.get_context("fork")  # forked, a process has template and tokenizer already
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(work,))
    waiting: deque = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_do_work, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenises was killed, most likely for want of memory; give --dataset_num_proc 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
