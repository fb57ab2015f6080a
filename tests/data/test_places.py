"""Files and lines as numbers, and as they are listed in messages."""

from utils.data.places import (
    RowLocations,
    decode_source,
    encode_source,
    format_lines,
    format_sources,
    group_by_file,
    locate_sources,
    row_location,
)


def test_a_file_and_a_line_are_one_number_and_back():
    assert encode_source(0, 3) == 3 and encode_source(2, 5) == 2 * 2**40 + 5
    for place in ((0, 1), (7, 2**40 - 1)):
        assert decode_source(encode_source(*place)) == place
    assert row_location({"source": [encode_source(1, 4), encode_source(1, 9)]}) == (1, 4)


def test_rows_are_listed_by_file_in_order_and_once():
    sources = [encode_source(1, 2), 7, 3, 7]
    assert format_sources(sources, ["a.jsonl", "b.jsonl"]) == "\n  a.jsonl: line 3, 7\n  b.jsonl: line 2"
    assert locate_sources(sources[:3], ["a", "b"]) == {"a": RowLocations([3, 7], 2), "b": RowLocations([2], 1)}


def test_a_full_list_of_lines_is_shown_as_incomplete():
    assert format_lines({"a": [1, 2]}, {"a": 1002}) == "\n  a: line 1, 2 and 1,000 more"
    assert format_lines({"a": [1, 2]}) == "\n  a: line 1, 2"
    assert format_lines({str(i): [1] for i in range(20)}).endswith("\n  19: line 1")
    many = {str(i): [1] for i in range(23)}
    assert format_lines(many).endswith("\n  19: line 1\n  … and 3 more groups of such rows, 3 rows in all")
    told = format_lines(many, {place: 1000 for place in many})
    assert told.endswith("19: line 1 and 999 more\n  … and 3 more groups of such rows, 3,000 rows in all")


def test_of_many_lines_the_first_are_kept_and_all_counted():
    found = group_by_file(("a", line) for line in range(1, 1502))["a"]
    assert (len(found.lines), found.count) == (1000, 1501)
    assert str(found) == f"line {', '.join(map(str, range(1, 31)))} and 1,471 more"
    assert str(RowLocations([3, 5], 2)) == "line 3, 5"
