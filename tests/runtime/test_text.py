"""Sizes, counts and settings as text, and Markdown tables; escaping is tested by tests/run/test_card.py."""

import pytest

from utils.runtime.text import format_count, format_setting, format_size, inline_code, markdown_table, settings_table


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (3_200_000_000, "3.2 GB"), (5e15, "5000.0 TB")],
)
def test_sizes(count, text):
    assert format_size(count) == text


def test_counts_have_their_plural():
    assert [format_count(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
    assert [format_count(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]


def test_settings():
    assert [format_setting(value) for value in (True, None, [], ["a", 1], 2e-5)] == [
        "true",
        "none",
        "none",
        "a, 1",
        "2e-05",
    ]


def test_a_bar_in_a_cell_does_not_end_it():
    assert markdown_table(["a", "b"], [["x|y", 1]]) == "| a | b |\n|---|---|\n| x\\|y | 1 |"


def test_an_aligned_table_has_columns_of_one_width():
    table = markdown_table(["metric", "base"], [["exact match", "1.50"], ["bleu", "12.00"]], aligned=True)
    assert table.splitlines() == [
        "| metric      |  base |",
        "|-------------|------:|",
        "| exact match |  1.50 |",
        "| bleu        | 12.00 |",
    ]


def test_names_and_values_are_escaped_once():
    assert settings_table([("a_b", "<x>"), ("path", inline_code("c|d"))]).splitlines() == [
        "|  |  |", "|---|---|", "| a_b | &#60;x&#62; |", "| path | <code>c&#124;d</code> |",
    ]  # fmt: skip
