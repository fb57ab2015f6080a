"""`--columns`: fields of the data files under other names than the formats have."""

from collections.abc import Callable
from typing import Any

from utils.data.bad_rows import BadRow
from utils.data.formats import is_empty
from utils.data.json_rows import RawRow
from utils.data.json_text import DECODER
from utils.runtime.errors import Problem, refusal

COLUMNS_HELP = (
    "Fields of the data files under other names, as a JSON object from the name in a format of docs/data.md: "
    '\'{"instruction": "frage", "output": "antwort"}\'.'
)
_SHAPE = (
    """an object such as '{"instruction": "frage", "output": "antwort"}': the name in a format → that in the files"""
)


def parse_columns(text: str | None) -> tuple[dict[str, str], list[Problem]]:
    """Parses the value of `--columns`.

    Returns:
        name in a format → name in the files, and the problems.
    """
    if text is None:
        return {}, []
    try:
        columns = DECODER.decode(text)
    except ValueError as error:
        return {}, refusal(f"--columns {text!r} is not JSON ({error}); give {_SHAPE}", "columns")
    if not isinstance(columns, dict) or not all(isinstance(name, str) and name for name in columns.values()):
        return {}, refusal(f"--columns {text!r} is not {_SHAPE}", "columns")
    twice = [name for name in columns.values() if list(columns.values()).count(name) > 1]
    if twice:
        return {}, refusal(f"--columns reads {twice[0]!r} as two fields; name it once", "columns")
    return columns, []


def rename_fields(row: Any, columns: dict[str, str]) -> Any:
    """A raw row with the names that the formats have: `{"frage": "Hi"}` → `{"instruction": "Hi"}`.

    Raises:
        BadRow: the row has a field of the new name, too.
    """
    if not (columns and isinstance(row, dict)):
        return row
    new_names = {old: new for new, old in columns.items()}
    renamed: dict = {}
    for name, value in row.items():
        new = new_names.get(name, name)
        if new in renamed:
            if is_empty(value):
                continue
            if not is_empty(renamed[new]):
                raise BadRow(f"has {new!r} beside {columns[new]!r}, which --columns reads as {new!r}; keep one of them")
        renamed[new] = value
    return renamed


def rename_raw(raw: RawRow, columns: dict[str, str]) -> RawRow:
    """As `rename_fields`, for a row with its place; a row that cannot be renamed gets a `problem`."""
    try:
        return raw._replace(value=rename_fields(raw.value, columns))
    except BadRow as error:
        return raw._replace(value=None, problem=str(error))


def with_columns(read: Callable[[Any], Any], columns: dict[str, str]) -> Callable[[Any], Any]:
    """A function that reads raw rows with other names, such as `RowType.read`."""
    if not columns:
        return read

    def read_renamed(row):
        try:
            return read(rename_fields(row, columns))
        except BadRow as error:
            missing = [name for name in columns.values() if isinstance(row, dict) and name not in row]
            if missing:
                named = " and ".join(map(repr, missing))
                error.args = (f"{error}; it has no {named}, which --columns names",)
            raise

    return read_renamed
