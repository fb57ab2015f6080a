"""Parses JSON strictly: an object with one key twice is an error, where `json` takes the last without a word."""

import json
from typing import Any


class TwoValues(ValueError):
    """An object has one key twice."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise TwoValues(next(name for name in names if names.count(name) > 1))
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_once_each)


def from_json(value: Any) -> Any:
    """The value of a field that may be written as JSON text: `'["a"]'` → `["a"]`; any other text stays as it is."""
    if not isinstance(value, str):
        return value
    if value.strip() == "null":
        return None
    if value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return DECODER.decode(value)
    except (ValueError, RecursionError):
        return value
