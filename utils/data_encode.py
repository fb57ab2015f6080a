"""Checked rows → token ids and labels, in batches and in several processes."""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.data_report import TOO_LONG, DataReport, refuse_nothing_left
from utils.errors import UserError


@dataclass(frozen=True)
class RowKind:
    """How a task reads and encodes its rows.

    Attributes:
        suffixes: the kinds of file it reads.
        read: raw row → a value that JSON can hold; raises BadRow or EmptyRow.
        encode: values → for each `{"input_ids", "labels", "shortened"}`, or a reason to drop it.
        key: everything `encode` depends on, for the cache.
        pack: what is done with the whole encoded dataset at the end, if anything.
        refuse_long: whether a row that is too long stops the run.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Any], Any]
    encode: Callable[[list[Any]], list[dict | str]]
    key: dict[str, Any]
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
            "input_ids": Sequence(Value("int32")),
            "labels": Sequence(Value("int32")),
            "shortened": Value("bool"),
            "dropped": Value("string"),
            "file": Value("int32"),
            "line": Value("int64"),
        }
    )
    if len(checked) > 5000:
        enable_progress_bar()
    encoded = checked.map(
        functools.partial(_encode_batch, kind.encode),
        batched=True,
        remove_columns=["row"],
        features=features,
        num_proc=workers if workers > 1 else None,
        cache_file_name=str(scratch / "encoded.arrow"),
        new_fingerprint=scratch.name,
        desc="tokenising",
    )
    disable_progress_bar()
    return _without_dropped(encoded, files, report, kind.refuse_long)


def _encode_batch(encode: Callable, batch: dict[str, list]) -> dict[str, list]:
    results = encode([json.loads(row) for row in batch["row"]])
    empty = {"input_ids": [], "labels": [], "shortened": False}
    rows = [{**empty, "dropped": r} if isinstance(r, str) else {"dropped": None, **r} for r in results]
    return {name: [row[name] for row in rows] for name in ("input_ids", "labels", "shortened", "dropped")}


def _without_dropped(encoded, files: list[str], report: DataReport, refuse_long: bool):
    """Counts tokens, shortened and dropped rows column by column, and keeps the rest of the rows."""
    import pyarrow.compute as pc

    table = encoded.data
    columns = (table[name].to_pylist() for name in ("dropped", "shortened", "file", "line"))
    kept = []
    for index, (reason, shortened, file, line) in enumerate(zip(*columns, strict=True)):
        if reason is not None:
            report.drop(files[file], line, reason, TOO_LONG if TOO_LONG in reason else "with nothing to train")
            continue
        kept.append(index)
        if shortened:
            report.shorten(files[file], line)
    if refuse_long and TOO_LONG in report.dropped:
        raise UserError(
            f"{report.dropped[TOO_LONG]:,} of {report.rows:,} rows are too long, and --overlong error is given:"
            f"{report.named_places()}\n   Raise --max_len, or give --overlong truncate or drop"
        )
    refuse_nothing_left(report, len(kept), files)
    report.kept = len(kept)
    if len(kept) < len(encoded):
        encoded = encoded.select(kept)
    for batch in table["labels"].chunks:
        labels = batch.flatten()
        report.tokens += len(labels)
        report.trained_tokens += pc.sum(pc.greater_equal(labels, 0).cast("int64")).as_py() or 0
    return encoded.remove_columns(["shortened", "dropped", "file", "line"])
