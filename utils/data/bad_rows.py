"""Errors for a row that cannot be trained: malformed, without anything to train, or a pair of equal answers."""

from utils.data.json_rows import RawRow
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


def unreadable(row: RawRow) -> BadRow:
    """Makes the error for a row that could not be read from its file."""
    return BrokenUnicode(row.problem) if row.broken_unicode else BadRow(row.problem)
