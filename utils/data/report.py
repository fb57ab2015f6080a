"""The report of prepared rows: how many are trained on, which are dropped, and why."""

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from loguru import logger

from utils.data.places import MAX_PLACES_SHOWN, format_lines
from utils.runtime.errors import Problem, UserError
from utils.runtime.text import format_count
from utils.template.messages import UNTRAINED_ANSWER

MAX_LINES_KEPT = 100  # line numbers kept for the rows of one file with one reason
MAX_GROUPS = 1000  # of the rows of one file; the reason of a malformed row holds a part of its text, and is its own
OTHER_REASON = f"has another problem than the first {MAX_GROUPS:,} of this file"

# kinds of dropped rows, as they are counted in messages
MALFORMED = "malformed"
BROKEN_UNICODE = "malformed Unicode"
TOO_LONG = "too long"
_COUNTED_AS = {BROKEN_UNICODE: MALFORMED}
# a kind of rows that are kept
SHORTENED = "shortened"


# fields of DataReport that are added up
_SUMS = (
    "rows", "kept", "tokens", "trained_tokens", "token_rows", "weighted", "answers", "untrained", "not_chosen",
    "shortened",
)  # fmt: skip


class Dropped(NamedTuple):
    """Why a row is dropped.

    Attributes:
        reason: completes "line N …".
        kind: the heading that it is counted under, such as `too long`.
    """

    reason: str
    kind: str = "with nothing to train"


class RowRecord(NamedTuple):
    """A row that is dropped or only partly used.

    Attributes:
        file, line: where it is.
        kind: `MALFORMED`, `BROKEN_UNICODE`, `TOO_LONG`, that of an EmptyRow, `SHORTENED`, or `UNTRAINED_ANSWER` for a
            kept row with an answer that is not trained.
        reason: completes "line N …".
    """

    file: str
    line: int
    kind: str
    reason: str


class RowGroup(NamedTuple):
    """The rows of one file with the same kind and reason: the lines of the first hundred, and the number of all."""

    file: str
    kind: str
    reason: str
    lines: list[int]
    count: int


@dataclass
class DataReport:
    """What preparing the rows of one set of files resulted in.

    Attributes:
        rows: number of rows in the files.
        kept: number of rows that are trained on.
        tokens: number of their tokens; `trained_tokens` of those with a label.
        dropped: kind, as it is counted in messages → number of rows.
        records: the rows that are dropped or only partly used, the first hundred of each file, kind and reason.
        totals: (file, kind, reason) → number of all such rows.
        key: a hash of the prepared ids and labels.
        files: the files, in the order of their indices in `source`.
        hashes: file → its sha256; `bytes_of` its size in bytes.
        unread: file → field that is not read → number of rows with it.
        missing_columns: fields that `--columns` names and no row has.
        token_rows: number of kept rows that were token ids in their file.
        weighted: number of kept rows with a weight other than 0 and 1.
        answers: number of answers in kept rows of conversations.
        untrained: number of those that are not trained, other than by `--train_on`, which leaves `not_chosen` out.
        shortened: number of rows that were truncated.

    Of each file at most `MAX_GROUPS` groups are kept; further rows of a kind are one group with `OTHER_REASON`.
    """

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    records: list[RowRecord] = field(default_factory=list)
    totals: dict[tuple[str, str, str], int] = field(default_factory=dict)
    key: str = ""
    files: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    bytes_of: dict[str, int] = field(default_factory=dict)
    unread: dict[str, dict[str, int]] = field(default_factory=dict)
    missing_columns: list[str] = field(default_factory=list)
    token_rows: int = 0
    weighted: int = 0
    answers: int = 0
    untrained: int = 0
    not_chosen: int = 0
    shortened: int = 0

    def __post_init__(self):
        self._groups_of = Counter(file for file, *_ in self.totals)

    def add_chunk(self, chunk) -> None:
        """Counts the rows of an `utils.data.encode.EncodedChunk`."""
        self.rows += chunk.rows
        self.kept += chunk.rows - len(chunk.dropped)
        self.tokens += chunk.tokens
        self.trained_tokens += chunk.trained_tokens
        for line, reason, kind in sorted(chunk.dropped):
            self.drop(chunk.file, line, reason, kind)
        for line in chunk.shortened:
            self.shorten(chunk.file, line)
        for line, reason in chunk.untrained:
            self.leave_untrained(chunk.file, line, reason)
        self.note_unread(chunk.file, chunk.unread)
        self.token_rows += chunk.token_rows
        self.weighted += chunk.weighted
        self.answers += chunk.answers[0]
        self.not_chosen += chunk.answers[1]

    def take_counts(self, other: "DataReport") -> None:
        """Replaces what became of the rows by that of another report; the files, their hashes and the key stay."""
        for name in (*_SUMS, "dropped", "records", "totals", "unread"):
            setattr(self, name, getattr(other, name))

    def token_share(self) -> str:
        """`"tokens: 5,277, of them trained 1,741 (33 %)"`"""
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        return f"tokens: {self.tokens:,}, of them trained {self.trained_tokens:,} ({share:.0f} %)"

    def merge(self, other: "DataReport") -> None:
        """Adds the counts and records of a report on other rows."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, count in other.dropped.items():
            self.dropped[kind] = self.dropped.get(kind, 0) + count
        for group, count in other.totals.items():
            group = self._group(*group)
            self.totals[group] = self.totals.get(group, 0) + count
        for file, fields in other.unread.items():
            self.note_unread(file, fields)
        kept: dict[tuple[str, str, str], int] = {}
        records, self.records = self.records + other.records, []
        for record in records:
            group = self._group(record.file, record.kind, record.reason)
            kept[group] = kept.get(group, 0) + 1
            if kept[group] <= MAX_LINES_KEPT:
                self.records.append(record._replace(reason=group[2]))

    def drop(self, file: str, line: int, reason: str, kind: str) -> None:
        """Counts a dropped row and records where it is."""
        counted = _COUNTED_AS.get(kind, kind)
        self.dropped[counted] = self.dropped.get(counted, 0) + 1
        self._keep(RowRecord(file, line, kind, reason))

    def shorten(self, file: str, line: int) -> None:
        """Counts a truncated row and records where it is."""
        self.shortened += 1
        self._keep(RowRecord(file, line, SHORTENED, "was shortened"))

    def leave_untrained(self, file: str, line: int, reason: str) -> None:
        """Counts an answer in a kept row that is not trained and records where it is."""
        self.untrained += 1
        self._keep(RowRecord(file, line, UNTRAINED_ANSWER, reason))

    def rename_files(self, files: list[str]) -> None:
        """Replaces the names in `files`, and those of all records, by the names of the same files now."""
        names = dict(zip(self.files, files, strict=True))
        self.records = [record._replace(file=names[record.file]) for record in self.records]
        self.totals = {(names[file], *group): count for (file, *group), count in self.totals.items()}
        self.unread = {names[file]: fields for file, fields in self.unread.items()}
        self.files = files
        self.__post_init__()

    def _keep(self, record: RowRecord) -> None:
        group = self._group(record.file, record.kind, record.reason)
        self.totals[group] = self.totals.get(group, 0) + 1
        if self.totals[group] <= MAX_LINES_KEPT:
            self.records.append(record._replace(reason=group[2]))

    def _group(self, *group: str) -> tuple[str, str, str]:
        """The group of `totals` that rows with a file, kind and reason are counted in."""
        file, kind, _ = group
        if group not in self.totals and self._groups_of[file] >= MAX_GROUPS:
            group = (file, kind, OTHER_REASON)
        self._groups_of[file] += group not in self.totals
        return group

    def groups(self, *kinds: str) -> list[RowGroup]:
        """Groups the records, of the given kinds or of all, by file, kind and reason, in order."""
        lines: dict[tuple[str, str, str], list[int]] = {}
        for record in self.records:
            if not kinds or record.kind in kinds:
                lines.setdefault((record.file, record.kind, record.reason), []).append(record.line)
        return [RowGroup(*group, found, self.totals[group]) for group, found in lines.items()]

    def dropped_groups(self) -> list[RowGroup]:
        """Groups the records of dropped rows."""
        return [group for group in self.groups() if group.kind not in (SHORTENED, UNTRAINED_ANSWER)]

    def untrained_answers(self) -> str:
        """`"3 of 120 answers are not trained"`; empty if all are that `--train_on` selects."""
        if not self.untrained:
            return ""
        of = f" of {self.answers:,}" if self.answers else ""
        return f"{self.untrained:,}{of} answers {'are' if self.untrained > 1 else 'is'} not trained"

    def note_unread(self, file: str, fields: dict[str, int]) -> None:
        """Counts the rows that have fields which are not read."""
        for name, count in fields.items():
            counts = self.unread.setdefault(file, {})
            counts[name] = counts.get(name, 0) + count

    def leave_out_unread(self, names: Collection[str]) -> None:
        """Removes fields from those that are not read."""
        for name in names:
            for counts in self.unread.values():
                counts.pop(name, None)
        self.unread = {file: counts for file, counts in self.unread.items() if counts}

    def unread_fields(self) -> list[str]:
        """`["a.jsonl: fields not read: 'quality' (12 rows), 'notes' (3 rows)"]`"""
        return [f"{file}: fields not read: {_name_fields(counts)}" for file, counts in self.unread.items()]

    def dropped_rows(self) -> int:
        return sum(self.dropped.values())

    def log(self, name: str) -> None:
        """Logs how many rows are kept and, by file and line, which are not.

        Args:
            name: names the data, `train data`.
        """
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
        if self.weighted:
            logger.info("{}: {} with weighted answers", name, format_count(self.weighted, "row"))
        if self.not_chosen:
            logger.info("{}: {:,} of {:,} answers are left out by --train_on", name, self.not_chosen, self.answers)
        if self.untrained:
            places = _name_groups(self.groups(UNTRAINED_ANSWER))
            logger.warning("{}: {}:{}", name, self.untrained_answers(), places)
        if self.shortened:
            places = _name_groups(self.groups(SHORTENED))
            logger.warning("{}: {} truncated to fit:{}", name, format_count(self.shortened, "row"), places)
        if self.dropped:
            dropped = format_count(self.dropped_rows(), "row")
            logger.warning("{}: {} dropped ({}):{}", name, dropped, self.counts(), self.named_places())

    def counts(self) -> str:
        """`"28 with nothing to train, 32 too long"`"""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.dropped.items())

    def named_places(self) -> str:
        """Lists the dropped rows: one line for each file and reason, with line numbers."""
        return _name_groups(self.dropped_groups())


def to_stored(report: DataReport) -> dict:
    """Converts a report to JSON, whose keys must be texts, to store it with prepared rows."""
    totals = [[*group, count] for group, count in report.totals.items()]
    return {**asdict(report), "records": [[*record] for record in report.records], "totals": totals}


def from_stored(kept: dict, files: list[str]) -> DataReport:
    """Reads a report that `to_stored`, or an earlier version of this project, made.

    Args:
        kept: as read from JSON.
        files: the files that were prepared.

    Raises:
        KeyError, TypeError, ValueError: it is not a report.
    """
    kept = _from_places(kept, files) if "places" in kept else kept
    records = [RowRecord(*record) for record in kept["records"]]
    totals = {(file, kind, reason): count for file, kind, reason, count in kept["totals"]}
    return DataReport(**{**kept, "records": records, "totals": totals})


# how the reasons for malformed Unicode begin in reports of an earlier version, which had no kind of its own for them
_EARLIER_BROKEN = ("is not UTF-8; save the file as UTF-8", "has half a Unicode character (a lone surrogate)")


def _from_places(kept: dict, files: list[str]) -> dict:
    """Converts the format of earlier versions: `"file reason"` → lines, with kinds and counts under the same keys."""
    kept = dict(kept)
    counted, kinds = kept.pop("counted"), kept.pop("kinds")
    records, totals = [], []
    for name, kind in (("places", None), ("untrained_at", UNTRAINED_ANSWER), ("shortened_at", SHORTENED)):
        for place, lines in kept.pop(name).items():
            file = max((file for file in files if place.startswith(f"{file} ")), key=len)
            reason = place[len(file) + 1 :]
            broken = kinds.get(place) == MALFORMED and reason.startswith(_EARLIER_BROKEN)
            group = (file, kind or (BROKEN_UNICODE if broken else kinds[place]), reason)
            records += [(file, line, *group[1:]) for line in lines]
            totals.append((*group, counted[place]))
    return {**kept, "records": records, "totals": totals}


def _name_groups(groups: list[RowGroup]) -> str:
    named = {f"{group.file} {group.reason}": group for group in groups}
    lines = {name: group.lines for name, group in named.items()}
    return format_lines(lines, {name: group.count for name, group in named.items()})


def _name_fields(counts: dict[str, int]) -> str:
    named = sorted(counts.items(), key=lambda item: -item[1])[:MAX_PLACES_SHOWN]
    text = ", ".join(f"{name!r} ({count:,} row{'s' * (count != 1)})" for name, count in named)
    return text + (f" and {len(counts) - MAX_PLACES_SHOWN} more" if len(counts) > MAX_PLACES_SHOWN else "")


def refuse_nothing_left(report: DataReport, left: int, files: list[str]) -> None:
    """Raises a `UserError` if no row is left to train on."""
    if left:
        return
    if not report.rows:
        raise UserError(Problem(f"{', '.join(files)} holds no row", code="ROW_NOTHING_TRAINED"))
    codes = {MALFORMED: "ROW_UNREADABLE", TOO_LONG: "ROW_TOO_LONG"}
    code = next((code for kind, code in codes.items() if kind in report.dropped), "ROW_NOTHING_TRAINED")
    flags = ("max_len", "max_prompt_length") if TOO_LONG in report.dropped else ()
    remedy = "Raise --max_len (and --max_prompt_length), or" if flags else "Look at marks such as 'weight' 0, or"
    message = (
        f"none of the {report.rows:,} rows keeps a trained token ({report.counts()}):{report.named_places()}\n"
        f"   {remedy} correct the rows"
    )
    raise UserError(Problem(message, code, flags))
