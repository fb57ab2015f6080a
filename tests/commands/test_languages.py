"""The Chinese pages have what the English ones have: commands, headings, tables, links, figures."""

import re

import pytest
from conftest import ROOT
from pages import CHINESE, FENCE, anchors, headings, inline_code, lines_of, links, read

both = pytest.mark.parametrize(("english", "chinese"), CHINESE.items(), ids=list(CHINESE))
# figures of the Chinese pages that are words in English: page → figures
MONTHS = {"docs/templates.md": {"7", "4"}}


def code_blocks(page: str) -> list[tuple[str, str]]:
    """The language and the text of each code block; the comments of commands are left out."""
    found = FENCE.findall(read(page))
    return [(name, "\n".join(lines_of(text)) if name == "bash" else text) for name, text in found]


def tables(page: str) -> list[list[int]]:
    """The number of columns in each row of each table."""
    found = re.findall(r"(?:^\|.*\n)+", FENCE.sub("", read(page)), re.MULTILINE)
    return [[row.strip("|").count("|") + 1 for row in table.splitlines()] for table in found]


def list_items(page: str) -> int:
    return len(re.findall(r"^- ", FENCE.sub("", read(page)), re.MULTILINE))


def targets(page: str) -> list[str]:
    """Where a page's links lead, named from the project's root; an anchor becomes the number of its heading.

    A page that exists in Chinese is named by its English path.
    """
    english = {ours: theirs for theirs, ours in CHINESE.items()}
    found = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        name = str(file.relative_to(ROOT))
        place = f"#{anchors(name).index(anchor)}" if anchor else ""
        found.append(english.get(name, name) + place)
    return sorted(found)


def figures(text: str) -> set[str]:
    """The numbers of a text, as written."""
    return set(re.findall(r"\d+(?:[.,]\d+)*", text))


def test_the_pages_most_read_are_in_chinese():
    names = ("train", "data", "templates", "preferences", "before_training", "launching")
    assert {"README.md", *(f"docs/{name}.md" for name in names)} <= set(CHINESE)
    assert [page for page in CHINESE if not (ROOT / page).is_file()] == []


@both
def test_each_links_to_the_other_at_its_top(english, chinese):
    for page, other in ((english, chinese), (chinese, english)):
        top = "\n".join(read(page).splitlines()[:6])
        found = [(ROOT / page).parent / target for target in re.findall(r"\]\(([^()\s]+)\)", top)]
        assert ROOT / other in [file.resolve() for file in found], page


@both
def test_the_code_is_the_same(english, chinese):
    assert code_blocks(chinese) == code_blocks(english)


@both
def test_the_headings_tables_and_lists_are_the_same(english, chinese):
    assert [level for level, _ in headings(chinese)] == [level for level, _ in headings(english)]
    assert tables(chinese) == tables(english)
    assert list_items(chinese) == list_items(english)


@both
def test_flags_files_and_names_are_the_same(english, chinese):
    assert set(inline_code(chinese)) == set(inline_code(english))


@both
def test_the_links_lead_to_the_same_places(english, chinese):
    ours, theirs = (
        [place for place in targets(page) if place not in (english, chinese)] for page in (chinese, english)
    )
    assert ours == theirs


@both
def test_the_figures_are_the_same(english, chinese):
    months = MONTHS.get(english, set())
    assert figures(read(chinese)) - months == figures(read(english)) - months
