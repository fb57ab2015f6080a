"""Encodes raw rows: each chunk is parsed, checked, rendered and tokenised in one pass."""

import functools
import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from utils.data.bad_rows import BadRow, BrokenUnicode, EmptyRow, RefusedRow, unreadable
from utils.data.cache import tokenizer_key
from utils.data.columns import with_columns
from utils.data.curriculum import sorting_column
from utils.data.files import SUFFIXES, RawRow, parse_row
from utils.data.packing import pack_rows
from utils.data.parallel import Chunk, map_chunks
from utils.data.places import encode_source
from utils.data.report import TOO_LONG, Dropped
from utils.data.row_type import IDS, LABELS, RowType, arrow_type
from utils.data.token_rows import TokenRow, labelled_by, with_token_encoding, with_token_rows
from utils.template.messages import UNTRAINED_ANSWER
from utils.template.tokenize import IGNORE_INDEX


@dataclass(frozen=True)
class RowEncoder:
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
        renamed: the fields of the files that `--columns` names.
        also_read: fields of training rows that are read after the preparation, as by `--curriculum column:…`.
        shows_progress: whether a progress bar is shown.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Any], Any]
    encode: Callable[[list[Any]], list[dict | Dropped]]
    key: dict[str, Any]
    columns: dict[str, str] = field(default_factory=lambda: {"input_ids": IDS, "labels": LABELS})
    pack: Callable[[Any], Any] | None = None
    refuse_long: bool = False
    unread: Callable[[Any], list[str]] = lambda row: []
    renamed: tuple[str, ...] = ()
    also_read: tuple[str, ...] = ()
    shows_progress: bool = True


def build_row_encoder(
    args,
    train_args,
    tokenizer,
    row_type: RowType,
    read,
    encode,
    strategy: str | None = None,
    suffixes=SUFFIXES,
    all_tokens: bool | None = None,
    **key,
) -> RowEncoder:
    """Builds the RowEncoder of a task, with the settings that every task has: lengths, packing, and the cache's key.

    Args:
        row_type: of the task.
        read, encode, suffixes: as in RowEncoder.
        strategy: TRL's packing strategy, as in `pack_rows`; None for rows that cannot be packed.
        all_tokens: whether all tokens are trained of a row that is token ids without labels (`TokenRow`); None if such
            rows are not read.
        **key: what else the rows depend on.
    """
    pack, versions = _packing(args, train_args, strategy)
    if args.columns:
        key["columns"] = args.columns
    if all_tokens is not None:
        read = with_token_rows(read, labelled_by(tokenizer, all_tokens))
        encode = with_token_encoding(encode, None if pack and strategy == "bfd_split" else args.max_len)
    return RowEncoder(
        suffixes=suffixes,
        read=with_columns(read, args.column_names),
        encode=encode,
        key={
            "tokenizer": tokenizer_key(tokenizer),
            "max_len": args.max_len,
            "overlong": args.overlong,
            **versions,
            **key,
        },
        columns=row_type.columns,
        pack=pack,
        refuse_long=args.overlong == "error",
        unread=row_type.with_columns(args.column_names).unread,
        renamed=tuple(args.column_names.values()),
        also_read=tuple(filter(None, [sorting_column(args)])),
        shows_progress=not getattr(train_args, "disable_tqdm", False),
    )


def _packing(args, train_args, strategy: str | None) -> tuple[Callable | None, dict[str, Any]]:
    """The `pack` of a RowEncoder, None without packing, and what packed rows depend on."""
    if strategy is None or not getattr(train_args, "packing", False):
        return None, {"packing": None, "held_back": None}
    validation = (args.val_size, train_args.seed) if args.val_size else None
    pack = functools.partial(pack_rows, max_len=args.max_len, strategy=strategy)
    if validation:
        pack = functools.partial(pack, val_size=args.val_size, seed=train_args.seed)
    return pack, {"packing": f"{strategy}, TRL {importlib.metadata.version('trl')}", "held_back": validation}


@dataclass
class EncodedChunk:
    """The rows of one chunk, encoded.

    Attributes:
        rows: number of rows in the chunk.
        batch: the kept rows as a pyarrow RecordBatch; None if there are none.
        dropped: line, reason and kind of each row that is not kept, also of those in `refused`.
        shortened: lines of truncated rows.
        untrained: line and reason of each answer in a kept row that is not trained.
        answers: number of answers in kept rows, and of those that `--train_on` leaves out.
        token_rows: number of kept rows that were token ids in their file.
        weighted: number of kept rows with a weight other than 0 and 1.
        refused: each row that stops the run.
        unread: name of a field that is not read → number of rows with it.
        renamed: which of `RowEncoder.renamed` any row has.
    """

    file: str
    rows: int
    batch: Any = None
    tokens: int = 0
    trained_tokens: int = 0
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    shortened: list[int] = field(default_factory=list)
    untrained: list[tuple[int, str]] = field(default_factory=list)
    answers: tuple[int, int] = (0, 0)
    token_rows: int = 0
    weighted: int = 0
    refused: list[RefusedRow] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    renamed: set[str] = field(default_factory=set)


def encode_chunk(encoder: RowEncoder, on_bad_row: str, chunk: Chunk) -> EncodedChunk:
    """Parses, checks and encodes one chunk of rows."""
    encoded, lines, values = EncodedChunk(chunk.file, len(chunk.rows)), [], []
    for raw in chunk.rows:
        try:
            raw = parse_row(raw)
            if encoder.renamed and isinstance(raw.value, dict):
                encoded.renamed |= raw.value.keys() & set(encoder.renamed)
            value = _checked(encoder, raw)
            encoded.unread.update(encoder.unread(raw.value))
        except EmptyRow as error:
            if on_bad_row == "error":
                encoded.refused.append(RefusedRow(chunk.file, raw.line, str(error)))
            encoded.dropped.append((raw.line, str(error), error.kind))
        except BadRow as error:
            # the rows after a fatal one cannot be counted, so it stops the run in any case
            if on_bad_row != "drop" or raw.fatal:
                encoded.refused.append(RefusedRow(chunk.file, raw.line, str(error)))
            encoded.dropped.append((raw.line, str(error), error.kind))
        else:
            lines.append(raw.line)
            values.append(value)
    if values and not (chunk.check_only or encoded.refused):
        _encode(encoder, on_bad_row, chunk.number, lines, values, encoded)
    return encoded


def _checked(encoder: RowEncoder, raw: RawRow):
    if raw.problem:
        raise unreadable(raw)
    value = encoder.read(raw.value)
    if isinstance(value, TokenRow):  # no texts
        return value
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BrokenUnicode("has half a Unicode character (a lone surrogate)") from None
    return value


def _encode(
    encoder: RowEncoder, on_bad_row: str, number: int, lines: list[int], values: list, encoded: EncodedChunk
) -> None:
    import pyarrow

    kept, sources = [], []
    for line, row in zip(lines, encoder.encode(values), strict=True):
        if isinstance(row, Dropped):
            if on_bad_row == "error" and row.kind != TOO_LONG:  # rows that are too long are governed by --overlong
                encoded.refused.append(RefusedRow(encoded.file, line, row.reason))
            encoded.dropped.append((line, row.reason, row.kind))
            continue
        kept.append(row)
        sources.append([encode_source(number, line)])
        encoded.token_rows += row.get("is_ids", False)
        encoded.weighted += "loss_weights" in row
        if "answers" in row:
            encoded.answers = tuple(map(sum, zip(encoded.answers, row["answers"], strict=True)))
        if row["shortened"]:
            encoded.shortened.append(line)
        for note in row.get("notes", ()):
            if note.kind == UNTRAINED_ANSWER:
                encoded.untrained.append((line, note.reason))
            else:
                encoded.unread[note.reason] += 1
        for name, column in encoder.columns.items():
            if column == IDS:
                encoded.tokens += len(row[name])
            elif column == LABELS:
                encoded.trained_tokens += len(row[name]) - row[name].count(IGNORE_INDEX)
    if kept:
        columns = encoder.columns.items()
        arrays = [pyarrow.array([row.get(name) for row in kept], arrow_type(column)) for name, column in columns]
        arrays.append(pyarrow.array(sources, pyarrow.list_(pyarrow.int64())))
        encoded.batch = pyarrow.record_batch(arrays, [*encoder.columns, "source"])


def encode_files(files: list[str], encoder: RowEncoder, on_bad_row: str, workers: int | None) -> Iterator[EncodedChunk]:
    """Encodes the rows of all files, a chunk at a time, in the files' order.

    Args:
        files: paths of data files.
        encoder: how the task reads and encodes them.
        on_bad_row: `auto`, `error` or `drop`, as in CommonArgs.
        workers: processes; None for a number that the size of the files justifies.

    Raises:
        UserError: a process was killed.
    """
    refused: list[RefusedRow] = []
    work = functools.partial(encode_chunk, encoder, on_bad_row)
    # once a row stops the run, the remaining rows are only checked
    label = "tokenising" if encoder.shows_progress else None
    for encoded in map_chunks(work, files, workers, label, check_only=lambda: bool(refused)):
        refused.extend(encoded.refused)
        kept, dropped = encoded.batch.num_rows if encoded.batch else 0, len(encoded.dropped)
        if not refused and kept + dropped != encoded.rows:
            raise RuntimeError(f"of {encoded.rows} rows, {kept} are kept and {dropped} dropped")
        yield encoded
