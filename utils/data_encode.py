"""Checked rows → token ids and labels, in batches and in several processes."""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.data_report import TOO_LONG, DataReport, Dropped, refuse_nothing_left, source_of
from utils.errors import UserError


@dataclass(frozen=True)
class RowKind:
    """How a task reads and encodes its rows.

    Attributes:
        suffixes: the kinds of file it reads.
        read: raw row → a value that JSON can hold; raises BadRow or EmptyRow.
        encode: values → for each its columns and `shortened`, or why it is dropped.
        key: everything `encode` depends on, for the cache.
        columns: lists of token ids, named `…ids`, and of labels, named `…labels`, -100 where nothing is trained.
        pack: what is done with the whole encoded dataset at the end, if anything.
        refuse_long: whether a row that is too long stops the run.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Any], Any]
    encode: Callable[[list[Any]], list[dict | Dropped]]
    key: dict[str, Any]
    columns: tuple[str, ...] = ("input_ids", "labels")
    pack: Callable[[Any], Any] | None = None
    refuse_long: bool = False


def encoded_rows(checked, files: list[str], kind: RowKind, report: DataReport, scratch: Path, workers: int | None):
    """Tokenises in batches, in several processes where there are rows enough."""
    from datasets import Features, Sequence, Value
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    if workers is None:
        workers = min(os.cpu_count() or 1, 16, len(checked) // 5000)
    features = Features(
        {
            **{name: Sequence(Value("int32")) for name in kind.columns},
            "source": Sequence(Value("int64")),
            "shortened": Value("bool"),
            "dropped": Value("string"),
            "reason": Value("string"),
            "file": Value("int32"),
            "line": Value("int64"),
        }
    )
    if len(checked) > 5000:
        enable_progress_bar()
    encoded = checked.map(
        functools.partial(_encode_batch, kind),
        batched=True,
        remove_columns=["row"],
        features=features,
        num_proc=workers if workers > 1 else None,
        cache_file_name=str(scratch / "encoded.arrow"),
        new_fingerprint=scratch.name,
        desc="tokenising",
    )
    disable_progress_bar()
    return _without_dropped(encoded, files, report, kind)


def _encode_batch(kind: RowKind, batch: dict[str, list]) -> dict[str, list]:
    empty = {**{name: [] for name in kind.columns}, "shortened": False, "dropped": None, "reason": None}
    rows = []
    for result in kind.encode([json.loads(row) for row in batch["row"]]):
        found = {"dropped": result.kind, "reason": result.reason} if isinstance(result, Dropped) else result
        rows.append({**empty, **found})
    sources = [[source_of(*place)] for place in zip(batch["file"], batch["line"], strict=True)]
    return {**{name: [row[name] for row in rows] for name in empty}, "source": sources}


def _without_dropped(encoded, files: list[str], report: DataReport, kind: RowKind):
    """Counts tokens, shortened and dropped rows column by column, and keeps the rest of the rows."""
    import pyarrow.compute as pc

    table = encoded.data
    columns = (table[name].to_pylist() for name in ("dropped", "reason", "shortened", "file", "line"))
    kept = []
    for index, (dropped, reason, shortened, file, line) in enumerate(zip(*columns, strict=True)):
        if dropped is not None:
            report.drop(files[file], line, reason, dropped)
            continue
        kept.append(index)
        if shortened:
            report.shorten(files[file], line)
    if kind.refuse_long and TOO_LONG in report.dropped:
        raise UserError(
            f"{report.dropped[TOO_LONG]:,} of {report.rows:,} rows are too long, and --overlong error is given:"
            f"{report.named_places()}\n   Raise --max_len, or give --overlong truncate or drop"
        )
    refuse_nothing_left(report, len(kept), files)
    report.kept = len(kept)
    if len(kept) < len(encoded):
        encoded = encoded.select(kept)
    for name in kind.columns:
        for batch in table[name].chunks:
            values = batch.flatten()
            if name.endswith("ids"):
                report.tokens += len(values)
            else:
                report.trained_tokens += pc.sum(pc.greater_equal(values, 0).cast("int64")).as_py() or 0
    return encoded.remove_columns(["shortened", "dropped", "reason", "file", "line"])
