"""CSV, Parquet and Arrow files → raw rows."""

import csv
import sys
from collections.abc import Iterator
from typing import Any

from utils.data.formats import TOOL_FIELDS, TURN_FIELDS, holds_turns
from utils.data.json_rows import NOT_UTF8, RawRow, bad_bytes, open_text
from utils.data.json_text import from_json


def read_csv(file: str) -> Iterator[RawRow]:
    csv.field_size_limit(sys.maxsize)
    with open_text(file, newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        if not reader.fieldnames:  # reads the header line
            return
        reader.fieldnames = [name.strip() for name in reader.fieldnames]
        if problem := header_problem(reader.fieldnames):
            yield RawRow(file, 1, None, problem, fatal=True)
            return
        while True:
            start = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(file, start, None, f"is not CSV ({error})", fatal=True)
                return
            if None in row or None in row.values():
                yield RawRow(
                    file, start, None, f"has another number of cells than the header ({len(reader.fieldnames)})"
                )
            else:
                yield RawRow(file, start, {name: _cell(name, value) for name, value in row.items()})


def header_problem(names: list[str]) -> str | None:
    """Describes what is wrong with the column names of a table, which would affect every row; None if nothing is."""
    if any("\0" in name or bad_bytes(name) for name in names):
        return NOT_UTF8
    if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
        return f"has the one column {names[0]!r}; save it with commas between the cells, not {mark!r}"
    twice = next((name for name in names if name and names.count(name) > 1), None)
    return twice and f"has the column {twice!r} twice; keep one of them"


_TURNS = ("prompt", "chosen", "rejected", "reject")  # columns with texts or turns


def _cell(name: str, value: str) -> Any:
    """Parses a CSV cell as JSON in the columns that hold a list of turns, or may hold one."""
    if name in (*TURN_FIELDS, *TOOL_FIELDS, "history"):
        return from_json(value)
    parsed = from_json(value) if name in _TURNS else value
    return parsed if holds_turns(parsed) else value


def read_parquet(file: str) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        opened = pyarrow.parquet.ParquetFile(file)
        if problem := header_problem(opened.schema_arrow.names):
            yield RawRow(file, 0, None, problem, fatal=True)
            return
        for batch in opened.iter_batches(batch_size=1000):
            for value in batch.to_pylist():
                number += 1
                yield RawRow(file, number, without_padding(value))
    except (pyarrow.ArrowException, OSError) as error:
        yield RawRow(file, 0, None, f"is not a whole Parquet file ({error})", fatal=True)


def read_arrow(file: str) -> Iterator[RawRow]:
    """Yields the rows of an Arrow file, as a stream (which `datasets` writes) or in the file format."""
    import pyarrow
    import pyarrow.ipc

    number, opened = 0, None
    try:
        with pyarrow.memory_map(file) as source:
            try:
                batches = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                opened = pyarrow.ipc.open_file(source)
                batches = map(opened.get_batch, range(opened.num_record_batches))
            if problem := header_problem((opened or batches).schema.names):
                yield RawRow(file, 0, None, problem, fatal=True)
                return
            for batch in batches:
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(file, number, without_padding(value))
    except (pyarrow.ArrowException, OSError) as error:
        yield RawRow(file, 0, None, f"is not a whole Arrow file ({error})", fatal=True)


def without_padding(row: dict) -> dict:
    """A row of Parquet or Arrow without the fields that it has only because another row does.

    A column of objects has one list of fields for all rows, and each row null for those it lacks. In a tool call or a
    description of a tool they would be trained: `{"people": 4, "title": null}`. A null that a row means cannot be told
    from these, so it goes as well; one within a JSON text stays.

    `{"a": None, "b": [{"c": 1, "d": None}]}` → `{"a": None, "b": [{"c": 1}]}`
    """
    return {name: _filled(value) for name, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value
