"""Errors for a row that cannot be trained: malformed, without anything to train, or a pair of equal answers."""

from typing import NamedTuple

from utils.data.json_rows import RawRow
from utils.data.places import MAX_PLACES_SHOWN, RowLocations
from utils.data.report import BROKEN_UNICODE, MALFORMED


class BadRow(ValueError):
    """The row is malformed; the text completes "line N …".

    Attributes:
        kind: how a report counts such rows.
    """

    kind = MALFORMED


class BrokenUnicode(BadRow):
    """The row has bytes that are not UTF-8, or half of a character."""

    kind = BROKEN_UNICODE


class EmptyRow(BadRow):
    """The row is well-formed, but nothing in it could be trained.

    Attributes:
        kind: how such rows are counted.
    """

    kind = "with nothing to train"


class EqualPair(EmptyRow):
    """Both answers are equal."""

    kind = "with chosen equal to rejected"


class RefusedRow(NamedTuple):
    """A row that stops the run.

    Attributes:
        file, line: where it is; an empty file for a problem that is not that of a row.
        reason: completes "line N …".
    """

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.reason}" if self.file else self.reason


def format_refused(rows: list[RefusedRow]) -> str:
    """Lists rows for a message, those of one file with the same reason together: the first in full, then line numbers.

    `"\\n     a.jsonl:3 is no JSON\\n       the same: line 4, 9 and 20 more"`
    """
    groups: dict[tuple[str, str], list[RefusedRow]] = {}
    for row in rows:
        groups.setdefault((row.file, row.reason), []).append(row)
    shown = ""
    for first, *others in list(groups.values())[:MAX_PLACES_SHOWN]:
        shown += f"\n     {first}"
        if others:
            shown += f"\n       the same: {RowLocations([row.line for row in others], len(others))}"
    left = sum(map(len, list(groups.values())[MAX_PLACES_SHOWN:]))
    return shown + (f"\n     … and {left:,} more" if left else "")


def unreadable(row: RawRow) -> BadRow:
    """Makes the error for a row that could not be read from its file."""
    return BrokenUnicode(row.problem) if row.broken_unicode else BadRow(row.problem)
