"""How the rows that stop a run are listed."""

from utils.data.bad_rows import RefusedRow, format_refused


def test_rows_with_the_same_reason_are_listed_together():
    rows = [RefusedRow("a.jsonl", line, "is in no known format") for line in (2, 5, 9)]
    rows += [RefusedRow("b.jsonl", 1, "is in no known format"), RefusedRow("a.jsonl", 3, "is no JSON")]
    assert format_refused(rows) == (
        "\n     a.jsonl:2 is in no known format\n       the same: line 5, 9"
        "\n     b.jsonl:1 is in no known format\n     a.jsonl:3 is no JSON"
    )


def test_only_some_are_listed():
    rows = [RefusedRow("a.jsonl", line, "is bad") for line in range(1, 101)]
    rows += [RefusedRow("a.jsonl", 100 + number, f"lacks field {number}") for number in range(1, 30)]
    lines = format_refused(rows).splitlines()
    assert len(lines) == 1 + 20 + 1 + 1  # begins with a line break; the second row's line and the last
    assert lines[2] == f"       the same: line {', '.join(map(str, range(2, 32)))} and 69 more"
    assert lines[-1] == "     … and 10 more"


def test_a_problem_that_is_not_that_of_a_row_has_no_line():
    assert format_refused([RefusedRow("", 0, "a.jsonl was changed")]) == "\n     a.jsonl was changed"
