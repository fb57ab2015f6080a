"""The report of what became of the rows: records by file, line, kind and reason, and how they are kept."""

import json

from utils.data.report import (
    BROKEN_UNICODE,
    MALFORMED,
    MAX_GROUPS,
    OTHER_REASON,
    SHORTENED,
    TOO_LONG,
    DataReport,
    RowGroup,
    RowRecord,
    from_stored,
    to_stored,
)
from utils.template.messages import UNTRAINED_ANSWER


def filled() -> DataReport:
    report = DataReport(rows=200, kept=20, tokens=900, trained_tokens=300, key="abc", files=["a b.jsonl", "a"])
    for line in range(1, 151):
        report.drop("a b.jsonl", line, "is too long for --max_len 100", TOO_LONG)
    report.drop("a", 7, "is not JSON", MALFORMED)
    report.drop("a", 9, "is not UTF-8", BROKEN_UNICODE)
    report.shorten("a", 11)
    report.leave_untrained("a", 12, "has an empty answer")
    report.leave_untrained("a", 13, "has an empty answer")
    report.note_unread("a", {"quality": 3})
    return report


def test_rows_are_kept_by_file_kind_and_reason():
    report = filled()
    assert report.dropped == {"too long": 150, "malformed": 2}  # broken Unicode is counted among the malformed
    assert report.counts() == "150 too long, 2 malformed" and report.dropped_rows() == 152
    assert (report.shortened, report.untrained) == (1, 2)
    assert report.records[0] == RowRecord("a b.jsonl", 1, TOO_LONG, "is too long for --max_len 100")
    assert len(report.records) == 100 + 5  # of each group the first hundred
    assert report.groups() == [
        RowGroup("a b.jsonl", TOO_LONG, "is too long for --max_len 100", list(range(1, 101)), 150),
        RowGroup("a", MALFORMED, "is not JSON", [7], 1),
        RowGroup("a", BROKEN_UNICODE, "is not UTF-8", [9], 1),
        RowGroup("a", SHORTENED, "was shortened", [11], 1),
        RowGroup("a", UNTRAINED_ANSWER, "has an empty answer", [12, 13], 2),
    ]
    assert report.groups(SHORTENED, UNTRAINED_ANSWER) == report.groups()[3:]
    assert report.dropped_groups() == report.groups()[:3]


def test_the_log_names_the_lines():
    hundred = ", ".join(map(str, range(1, 101)))
    assert filled().named_places() == (
        f"\n  a b.jsonl is too long for --max_len 100: line {hundred} and 50 more"
        "\n  a is not JSON: line 7\n  a is not UTF-8: line 9"
    )


def test_a_report_is_the_same_after_it_was_kept():
    report = filled()
    assert from_stored(json.loads(json.dumps(to_stored(report))), report.files) == report


# what versions before the records kept beside prepared rows, of two files of which one's name begins with the other's
EARLIER = {
    "rows": 6, "kept": 3, "tokens": 90, "trained_tokens": 30, "dropped": {"too long": 2, "malformed": 1},
    "places": {"a b is too long for --max_len 9": [2, 3], "a is not UTF-8; save the file as UTF-8": [4]},
    "key": "abc", "files": [], "hashes": {}, "bytes_of": {},
    "kinds": {"a b is too long for --max_len 9": "too long", "a is not UTF-8; save the file as UTF-8": "malformed"},
    "counted": {"a b is too long for --max_len 9": 2, "a is not UTF-8; save the file as UTF-8": 1,
                "a has an empty answer": 1, "a b was shortened": 1},
    "unread": {"a": {"quality": 3}}, "untrained": 1, "untrained_at": {"a has an empty answer": [5]},
    "shortened": 1, "shortened_at": {"a b was shortened": [6]},
}  # fmt: skip


def test_a_report_of_an_earlier_version_is_taken():
    report = from_stored(json.loads(json.dumps(EARLIER)), ["a", "a b"])
    assert report.groups() == [
        RowGroup("a b", TOO_LONG, "is too long for --max_len 9", [2, 3], 2),
        RowGroup("a", BROKEN_UNICODE, "is not UTF-8; save the file as UTF-8", [4], 1),
        RowGroup("a", UNTRAINED_ANSWER, "has an empty answer", [5], 1),
        RowGroup("a b", SHORTENED, "was shortened", [6], 1),
    ]
    assert (report.rows, report.kept, report.dropped, report.untrained) == (6, 3, EARLIER["dropped"], 1)
    assert report.unread == {"a": {"quality": 3}}


def test_reasons_without_end_are_one_group_beyond_the_first_thousand():
    report, halves = DataReport(), [DataReport(), DataReport()]
    for line in range(1, 3001):
        for counted in (report, halves[line > 1500]):
            counted.drop("a", line, f"is not JSON: {line}", MALFORMED)
            counted.drop("a", line, "is too long", TOO_LONG)
    report.drop("b", 1, "is not JSON: 1", MALFORMED)
    merged = from_stored(json.loads(json.dumps(to_stored(halves[0]))), [])
    merged.merge(halves[1])
    merged.drop("b", 1, "is not JSON: 1", MALFORMED)
    assert merged.totals == report.totals and merged.dropped == report.dropped
    groups = report.dropped_groups()
    assert len(groups) == MAX_GROUPS + 1 + 1 and sum(group.count for group in groups) == 6001
    assert groups[-2] == RowGroup("a", MALFORMED, OTHER_REASON, list(range(1000, 1100)), 2001)
    assert merged.dropped_groups()[-2].count == 2001 and len(to_stored(merged)["records"]) <= MAX_GROUPS + 300
