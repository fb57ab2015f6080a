"""Where rows come from: a file and a line, packed into one number for a dataset's column `source`."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from utils.runtime.text import format_count

MAX_PLACES_SHOWN = 20  # files, or files with a reason, that a message lists
_LINE_BITS = 40
_MAX_LINES_KEPT = 1000  # of one file in a RowLocations
_MAX_LINES_SHOWN = 30


def encode_source(file: int, line: int) -> int:
    """Packs the index of a file and a line number into one integer: the low 40 bits hold the line; also of arrays."""
    return file << _LINE_BITS | line


def decode_source(source: int) -> tuple[int, int]:
    """Returns the index of the file and the line number that `encode_source` packed."""
    return divmod(int(source), 1 << _LINE_BITS)


def decode_sources(sources):
    """As `decode_source`, for a NumPy array: the indices of the files and the line numbers, [N] each."""
    return sources >> _LINE_BITS, sources & ((1 << _LINE_BITS) - 1)


def row_location(row: dict) -> tuple[int, int]:
    """Returns the index of a prepared row's file and its line number; the first ones of a packed row."""
    return decode_source(row["source"][0])


def format_sources(sources: Iterable[int], files: list[str]) -> str:
    """Lists rows by file and line: `format_sources([3, 7], ["a.jsonl"])` → `"\\n  a.jsonl: line 3, 7"`."""
    lines: dict[str, list[int]] = {}
    for file, line in map(decode_source, sorted(set(sources))):
        lines.setdefault(files[file], []).append(line)
    return format_lines(lines)


def format_lines(lines: dict[str, list[int]], counts: dict[str, int] | None = None) -> str:
    """Formats line numbers, one output line for each key.

    Args:
        lines: file, or file and reason → line numbers.
        counts: the same keys → how many rows there are, where not every line number was kept.
    """
    counts = counts or {place: len(numbers) for place, numbers in lines.items()}
    shown = []
    for place, numbers in list(lines.items())[:MAX_PLACES_SHOWN]:
        more = counts[place] - len(numbers)
        shown.append(f"\n  {place}: line {', '.join(map(str, numbers))}" + (f" and {more:,} more" if more else ""))
    if left := list(counts.values())[MAX_PLACES_SHOWN:]:
        groups, rows = format_count(len(left), "more group"), format_count(sum(left), "row")
        shown.append(f"\n  … and {groups} of such rows, {rows} in all")
    return "".join(shown)


@dataclass
class RowLocations:
    """Line numbers of rows in one file.

    Attributes:
        lines: the first thousand, in the order in which they were added.
        count: the number of all of them.
    """

    lines: list[int] = field(default_factory=list)
    count: int = 0

    def add(self, line: int) -> None:
        self.count += 1
        if len(self.lines) < _MAX_LINES_KEPT:
            self.lines.append(line)

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.lines[:_MAX_LINES_SHOWN]))
        more = self.count - min(len(self.lines), _MAX_LINES_SHOWN)
        return f"line {shown}" + (f" and {more:,} more" if more else "")


def group_by_file(locations: Iterable[tuple[str, int]]) -> dict[str, RowLocations]:
    """Groups (file, line) pairs: `[("a", 3), ("a", 5)]` → `{"a": RowLocations([3, 5], 2)}`."""
    found: dict[str, RowLocations] = {}
    for file, line in locations:
        found.setdefault(file, RowLocations()).add(line)
    return found


def locate_sources(sources: Iterable[int], files: list[str]) -> dict[str, RowLocations]:
    """Decodes and groups values of the column `source`: file → lines.

    Args:
        sources: as made by `encode_source`.
        files: the files, in the order of their indices.
    """
    return group_by_file((files[file], line) for file, line in map(decode_source, sorted(sources)))
