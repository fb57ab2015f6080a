"""Reads raw rows from JSON files of any common structure.

The content of a file decides, not its name: one row a line (JSON Lines), one array, one object that wraps an array
(`{"data": […]}`), one object that is a row, or several objects that each span lines.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from utils.data.formats import CONVERSATION_FORMATS, PAIR_FORMATS, find_format
from utils.data.json_text import DECODER, TwoValues


class RawRow(NamedTuple):
    """A row as it is in its file.

    Attributes:
        problem: why it could not be read.
        fatal: whether the rest of the file could not be read either.
        unparsed: whether `value` is still a line of JSON.
        broken_unicode: whether the problem is bytes that are not UTF-8.
    """

    file: str
    line: int
    value: Any
    problem: str | None = None
    fatal: bool = False
    unparsed: bool = False
    broken_unicode: bool = False


NOT_UTF8, _BYTES = "is not UTF-8; save the file as UTF-8", re.compile("[\udc80-\udcff]")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # suffix → pyarrow's name
_WRAPPERS = ("data", "rows", "examples", "instances", "items", "train")  # keys under which a file's rows may stand


def bad_bytes(text: str) -> bool:
    """Whether a text read by `open_text` holds bytes that are not UTF-8: they are read as lone surrogates."""
    return not text.isascii() and _BYTES.search(text) is not None


def open_text(file: str, newline: str | None = None):
    """Opens a text file, also a compressed one, without its BOM.

    Bytes that are not UTF-8 become lone surrogates, without an error.
    """
    decoding = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": newline}
    compression = COMPRESSIONS.get(Path(file).suffix.lower())
    if compression is None:
        return open(file, **decoding)
    import pyarrow

    return io.TextIOWrapper(pyarrow.input_stream(file, compression=compression), **decoding)


def kind_of_file(file: str | Path) -> str:
    """The suffix that tells what a file holds: `rows.JSONL.gz` → `.jsonl`."""
    path = Path(file)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSIONS else path.suffix.lower()


def parse_line(file: str, line: int, text: str) -> RawRow:
    """Parses a line of JSON; returns a row, with a `problem` if it is malformed."""
    if "\0" in text or bad_bytes(text):  # in UTF-16 every other byte is 0, which JSON never holds
        return RawRow(file, line, None, NOT_UTF8, broken_unicode=True)
    try:
        return RawRow(file, line, DECODER.decode(text))
    except (ValueError, RecursionError) as error:
        return RawRow(file, line, None, _problem(text, error))


def _problem(text: str, error: Exception) -> str:
    if isinstance(error, TwoValues):
        return f"has the key {str(error)!r} twice in one object; keep one of them"
    problem = f"is not JSON ({error}): {text.strip()[:40]!r}"
    return problem + "; is the file written to its end?" if _ends_early(text, error) else problem


def _ends_early(text: str, error: Exception) -> bool:
    """Whether the text ends too early, with an open bracket or quotation mark."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    # CPython's json names a text without its end only in the message, and its position is where the text begins
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")


def read_json(file: str) -> Iterator[RawRow]:
    """Yields the rows of a `.json` or `.jsonl` file; lines of JSON unparsed, for `parse_line`."""
    if not has_a_row_a_line(file):
        with open_text(file) as opened:
            text = opened.read()
        rows = None if "\0" in text or bad_bytes(text) else _whole(file, text)
        if rows is not None:
            yield from rows
            return
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield RawRow(file, number, line, unparsed=True)


def has_a_row_a_line(file: str) -> bool:
    """Whether the first line is a complete value, or malformed before its end, and other lines follow."""
    with open_text(file) as lines:
        full = (line for line in lines if line.strip())
        first, another = next(full, ""), next(full, None)
    try:
        value = json.loads(first)
    except (ValueError, RecursionError) as error:
        return another is not None and not _ends_early(first, error)
    return another is not None or not isinstance(value, list | dict)


def _whole(file: str, text: str) -> list[RawRow] | None:
    """The rows of a file whose values stand on several lines; None where it is not such a file.

    An array that is broken is told by one row with a problem.
    """
    rows, place, line = [], _skip_space(text, 0), 1
    line += text.count("\n", 0, place)
    while place < len(text):
        try:
            value, end = DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            if not (text[place] == "[" or rows or isinstance(error, TwoValues)):
                return None
            rows.append(RawRow(file, line, None, _problem(text[place:], error), fatal=True))
            break
        rows.append(RawRow(file, line, value))
        end = _skip_space(text, end)
        line += text.count("\n", place, end)
        place = end
    if len(rows) == 1 and not rows[0].problem:
        return _from_one(file, rows[0].value)
    if len({row.line for row in rows}) < len(rows):  # several on one line: a row is known by its number
        return [row._replace(line=number) for number, row in enumerate(rows, 1)]
    return rows


_SPACE = re.compile(r"\s*")


def _skip_space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()


def _from_one(file: str, value: Any) -> list[RawRow]:
    """The rows of a file that is one value: an array, an object with an array of rows in it, or a row."""
    if isinstance(value, dict):
        form = find_format(value, CONVERSATION_FORMATS + PAIR_FORMATS)
        is_row = form is not None and form.filled(value) == 1
        lists = [name for name, items in value.items() if isinstance(items, list)]
        if _are_columns(value) and not (is_row and form.convert and len(lists) == 1):  # UltraChat's rows are a list
            problem = "is one object of columns, not of rows; save it a row a line (pandas: to_json(orient='records'))"
            return [RawRow(file, 1, None, problem, fatal=True)]
        if is_row:
            return [RawRow(file, 1, value)]  # a row, whatever lists its other fields hold
        lists = [name for name, items in value.items() if _are_rows(items)]
        wrapped = [name for name in lists if name in _WRAPPERS]
        if wrapped and len(lists) > 1:
            named = " and ".join(map(repr, lists))
            return [RawRow(file, 1, None, f"is one object with rows in {named}; save each as a file of its own", True)]
        value = value[wrapped[0]] if wrapped else [value]
    return [RawRow(file, number, item) for number, item in enumerate(value, 1)]


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


_TURNS = ("messages", "conversations", "prompt", "chosen", "rejected")


def _are_columns(value: dict) -> bool:
    """`{"instruction": ["a", "b"], "output": ["c", "d"]}`, or with objects from row number to text."""
    if any(isinstance(turn := value.get(name), dict) and {"role", "from"} & turn.keys() for name in _TURNS):
        return False  # one message where a list of them belongs, which the row's reader says
    columns = [list(item.values()) if isinstance(item, dict) else item for item in value.values()]
    if not columns or not all(isinstance(column, list) and column for column in columns):
        return False
    scalars = all(not isinstance(item, list | dict) for column in columns for item in column)
    if "input_ids" in value:  # lists of token ids, labels and masks
        return False
    return scalars and len({len(column) for column in columns}) == 1
