"""What became of the rows: how many are trained on, which are left out, and why."""

from dataclasses import dataclass, field
from typing import NamedTuple

from loguru import logger

from utils.errors import UserError

SHOWN = 20  # so many bad rows are named one by one
_LINES = 100  # so many line numbers are kept for each reason


class Dropped(NamedTuple):
    """Why a row is left out.

    Attributes:
        reason: completes "line N …".
        kind: how such rows are counted.
    """

    reason: str
    kind: str = "with nothing to train"


TOO_LONG = "too long"


@dataclass
class DataReport:
    """What became of the rows of one set of files.

    Attributes:
        rows: how many rows the files hold.
        kept: how many are trained on.
        tokens: all their tokens; `trained_tokens` those with a label.
        dropped: reason → how many rows.
        places: `"file reason"` → the lines of the first hundred such rows.
        key: a hash of the prepared ids and labels.
        files: the files, in the order that `source_of` numbers them; `hashes` file → its sha256, `bytes_of` its size.
        kinds: the same places → how such rows are counted; `counted` place → how many there are.
        unread: file → field that is not read → how many rows have it.
        untrained: how many answers of kept rows are not trained; `untrained_at` `"file reason"` → the lines of the
            first hundred.
        shortened: how many rows lost their oldest turns to fit; `shortened_at` file → the first hundred lines.
    """

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[int]] = field(default_factory=dict)
    key: str = ""
    files: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    bytes_of: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    unread: dict[str, dict[str, int]] = field(default_factory=dict)
    untrained: int = 0
    untrained_at: dict[str, list[int]] = field(default_factory=dict)
    shortened: int = 0
    shortened_at: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, file: str, line: int, reason: str, kind: str) -> None:
        """Counts a row that is left out, and keeps where it stands."""
        self.dropped[kind] = self.dropped.get(kind, 0) + 1
        place = f"{file} {reason}"
        self.kinds[place] = kind
        self._keep(self.places, place, line)

    def shorten(self, file: str, line: int) -> None:
        """Counts a row that lost its oldest turns, and keeps where it stands."""
        self.shortened += 1
        self._keep(self.shortened_at, f"{file} was shortened", line)

    def leave_untrained(self, file: str, line: int, reason: str) -> None:
        """Counts an answer of a kept row that is not trained, and keeps where it stands."""
        self.untrained += 1
        self._keep(self.untrained_at, f"{file} {reason}", line)

    def note_unread(self, file: str, fields: dict[str, int]) -> None:
        """Counts fields of the rows that are not read."""
        for name, count in fields.items():
            counts = self.unread.setdefault(file, {})
            counts[name] = counts.get(name, 0) + count

    def unread_fields(self) -> list[str]:
        """`["a.jsonl: fields not read: 'quality' (12 rows), 'notes' (3 rows)"]`"""
        return [f"{file}: fields not read: {_name_fields(counts)}" for file, counts in self.unread.items()]

    def _keep(self, places: dict[str, list[int]], place: str, line: int) -> None:
        self.counted[place] = self.counted.get(place, 0) + 1
        lines = places.setdefault(place, [])
        if len(lines) < _LINES:
            lines.append(line)

    def dropped_rows(self) -> int:
        return sum(self.dropped.values())

    def log(self, name: str) -> None:
        """Says in the log what was kept and, by file and line, what was not."""
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        logger.info(
            "{}: {:,} of {:,} rows, {:,} tokens, {:.0f} % of them trained",
            name,
            self.kept,
            self.rows,
            self.tokens,
            share,
        )
        for line in self.unread_fields():
            logger.warning("{}: {}", name, line)
        if self.untrained:
            counted = f"{self.untrained:,} answer{'s are' if self.untrained > 1 else ' is'} not trained"
            logger.warning("{}: {}:{}", name, counted, _name_lines(self.untrained_at))
        if self.shortened:
            places = _name_lines(self.shortened_at)
            logger.warning("{}: {:,} rows were too long and have lost their beginning:{}", name, self.shortened, places)
        if self.dropped:
            logger.warning(
                "{}: {:,} rows are left out ({}):{}", name, self.dropped_rows(), self.counts(), self.named_places()
            )

    def counts(self) -> str:
        """`"28 with nothing to train, 32 too long"`"""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.dropped.items())

    def named_places(self) -> str:
        """A line for each file and reason, with line numbers."""
        return _name_lines(self.places)


def split_place(place: str, files: list[str]) -> tuple[str, str]:
    """`"a.jsonl has an empty output"` → `("a.jsonl", "has an empty output")`"""
    file = max((file for file in files if place.startswith(f"{file} ")), key=len)
    return file, place[len(file) + 1 :]


def _name_lines(places: dict[str, list[int]]) -> str:
    lines = []
    for place, numbers in list(places.items())[:SHOWN]:
        more = " and more" if len(numbers) == _LINES else ""
        lines.append(f"\n  {place}: line {', '.join(map(str, numbers))}{more}")
    return "".join(lines) + ("\n  …" if len(places) > SHOWN else "")


def _name_fields(counts: dict[str, int]) -> str:
    named = sorted(counts.items(), key=lambda item: -item[1])[:SHOWN]
    text = ", ".join(f"{name!r} ({count:,} row{'s' * (count != 1)})" for name, count in named)
    return text + (f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")


def source_of(file: int, line: int) -> int:
    """Where a row stands, as one number: `source_of(1, 3)` is line 3 of the second file."""
    return file << 40 | line


def name_sources(sources: list[int], files: list[str]) -> str:
    """Rows by file and line: `name_sources([3, 7], ["a.jsonl"])` → `"\\n  a.jsonl: line 3, 7"`"""
    places: dict[str, list[int]] = {}
    for source in sorted(set(sources)):
        places.setdefault(files[source >> 40], []).append(source & ((1 << 40) - 1))
    return _name_lines(places)


def refuse_nothing_left(report: DataReport, left: int, files: list[str]) -> None:
    if left:
        return
    if not report.rows:
        raise UserError(f"{', '.join(files)} holds no row")
    raise UserError(
        f"none of the {report.rows:,} rows keeps a trained token ({report.counts()}):{report.named_places()}\n"
        "   Raise --max_len (and --max_prompt_length) if they are too long, or mend the rows"
    )
