"""The pages of the documentation: their commands, links and anchors."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
# the pages whose commands are typed by tests
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
# an English page → the same page in Chinese
CHINESE = {"README.md": "README_zh.md"} | {
    f"docs/{path.name}": f"docs/zh/{path.name}" for path in sorted((ROOT / "docs/zh").glob("*.md"))
}


def read(page: str) -> str:
    """The text of a page, named from the project's root."""
    return (ROOT / page).read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    """The text below a heading such as `## The doctor`, up to the next one of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    _, found, rest = read(page).partition(f"\n{heading}\n")
    assert found, f"{page} has no heading {heading!r}"
    fences = [match.span() for match in FENCE.finditer(rest)]  # a comment in a code block is not a heading
    for match in re.finditer(rf"^#{{1,{level}}} ", rest, re.MULTILINE):
        if not any(start <= match.start() < end for start, end in fences):
            return rest[: match.start()]
    return rest


def blocks(text: str, language: str) -> list[str]:
    """The contents of the code blocks in a language."""
    return [content for name, content in FENCE.findall(text) if name == language]


def lines_of(block: str) -> list[str]:
    """The commands of a code block: without comments, and with continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(line.partition("  #")[0].split()) for line in lines if line.strip()]


def commands(page: str, heading: str | None = None) -> list[str]:
    """The commands in a page's ```bash blocks, or in those of one section, each once."""
    text = section(page, heading) if heading else read(page)
    return list(dict.fromkeys(line for block in blocks(text, "bash") for line in lines_of(block)))


def inline_code(page: str) -> list[str]:
    """What a page has in `backticks`, outside of code blocks."""
    return INLINE.findall(FENCE.sub("", read(page)))


def links(page: str) -> list[str]:
    """The targets of a page's links and pictures; code is no link, but may be the text of one."""
    return LINK.findall(INLINE.sub("code", FENCE.sub("", read(page))))


def headings(page: str) -> list[tuple[int, str]]:
    """The level and the text of each heading."""
    found = re.findall(r"^(#{1,6}) (.+)$", FENCE.sub("", read(page)), re.MULTILINE)
    return [(len(marks), text) for marks, text in found]


def anchors(page: str) -> list[str]:
    """The anchors that GitHub gives a page's headings, in their order.

    `## What's new?` → `whats-new`; a second heading of that text → `whats-new-1`
    """
    found: list[str] = []
    for _, heading in headings(page):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.append(anchor)
    return found
