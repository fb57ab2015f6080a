"""Formats values for messages, reports and Markdown files."""

import re
from collections.abc import Iterable, Sequence
from enum import Enum

# characters with a meaning in Markdown or HTML, and parts of addresses that GitHub turns into links by itself
_SPECIAL = re.compile(r"[\\`*_\[\]<>&|~@]|:(?=//)|(?<=mailto):|(?<=xmpp):|(?<=\bwww)\.", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
_PLAIN = re.compile(r"[^\\`|]+")


def format_size(count: float) -> str:
    """Formats a number of bytes: `format_size(3_200_000_000)` → `"3.2 GB"`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_count(number: int, noun: str) -> str:
    """Formats a number with its noun: `"1 pass"`, `"2 passes"`, `"3,000 steps"`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def on_one_line(text: str) -> str:
    """Replaces control characters and line ends by spaces, so that a terminal shows a text on one line."""
    return "".join(character if character.isprintable() else " " for character in text)


def format_setting(value) -> str:
    """Formats a setting: `True` → `true`, `None` → `none`, `["a", "b"]` → `a, b`."""
    value = value.value if isinstance(value, Enum) else value
    text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    return {"True": "true", "False": "false", "None": "none"}.get(text, text)


# ------------------------------------------------------------------ Markdown


class Markdown(str):
    """Text that is Markdown already: every part from a user, a hub or the data was escaped."""


def escape_markdown(value) -> Markdown:
    """Escapes text so that Markdown shows it unchanged, in one line; `Markdown` is returned as it is.

    `escape_markdown("<img> [a](b)|")` → `"&#60;img&#62; &#91;a&#93;(b)&#124;"`
    """
    if isinstance(value, Markdown):
        return value
    text = _CONTROL.sub(" ", str(value))
    # an underscore within a word has no meaning in Markdown, and setting names are full of them
    text = re.sub(r"(?<=\w)_(?=\w)", "\0", text)
    return Markdown(_SPECIAL.sub(lambda found: f"&#{ord(found[0])};", text).replace("\0", "_"))


def inline_code(value) -> Markdown:
    """Formats a path or a name as code: in backticks, or in `<code>` if it holds a backtick, a backslash or a bar."""
    text = _CONTROL.sub(" ", str(value))
    if _PLAIN.fullmatch(text) and text.strip():
        return Markdown(f"`{text}`")
    return Markdown(f"<code>{escape_markdown(text)}</code>")


def code_block(text: str, language: str = "text") -> str:
    """Formats text as a fenced block that it cannot close itself; of a long text, the last 2,000 characters."""
    text = text if len(text) <= 2000 else f"… {text[-2000:]}"
    # an untrained model generates control characters too
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence], aligned: bool = False) -> str:
    """Formats a Markdown table. Bars within cells are escaped; any other markup in them keeps its meaning.

    Args:
        header: the titles of the columns.
        rows: the cells of each row, one for each column.
        aligned: pad the cells to equal widths, for a terminal, and right-align all columns but the first.
    """
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    if not aligned:
        return "\n".join(["| " + " | ".join(lines[0]) + " |", "|---" * len(header) + "|",
                          *("| " + " | ".join(line) + " |" for line in lines[1:])])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    text = ["| " + " | ".join(line) + " |" for line in padded]
    return "\n".join([text[0], "|" + "|".join(rule) + "|", *text[1:]])


def settings_table(rows: Iterable[tuple]) -> str:
    """Formats names and values as a Markdown table with an empty header; both are escaped."""
    return markdown_table(["", ""], [(escape_markdown(name), escape_markdown(value)) for name, value in rows])
