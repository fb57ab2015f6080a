"""Nulls that a table sets where a row has no such field."""

from typing import Any


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
