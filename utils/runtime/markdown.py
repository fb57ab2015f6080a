"""Texts that a user, a hub or the data chose, put into Markdown so that they show as they are and do nothing else."""

import re
from enum import Enum

# with a meaning in Markdown or HTML, or for links that GitHub makes by itself; as character references they have none
_SPECIAL = re.compile(r"[\\`*_\[\]<>&|~@]|:(?=//)|(?<=mailto):|(?<=xmpp):|(?<=\bwww)\.", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
_PLAIN = re.compile(r"[^\\`|]+")


class Markdown(str):
    """A text that is Markdown already, every foreign part of which went through `escape` or `code`."""


def escape(value) -> Markdown:
    """`escape("<img> [a](b)|")` → `"&#60;img&#62; &#91;a&#93;(b)&#124;"`; one line, shown as it is."""
    if isinstance(value, Markdown):
        return value
    text = _CONTROL.sub(" ", str(value))
    # within a word an underscore is itself, and settings are full of them
    text = re.sub(r"(?<=\w)_(?=\w)", "\0", text)
    return Markdown(_SPECIAL.sub(lambda found: f"&#{ord(found[0])};", text).replace("\0", "_"))


def code(value) -> Markdown:
    """A path or a name as code: in backticks, or as `<code>` where those or a table would take parts of it away."""
    text = _CONTROL.sub(" ", str(value))
    if _PLAIN.fullmatch(text) and text.strip():
        return Markdown(f"`{text}`")
    return Markdown(f"<code>{escape(text)}</code>")


def table(rows: list[tuple]) -> str:
    """A table of names and values, without a head."""
    lines = [f"| {escape(name)} | {escape(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def fenced(text: str, kind: str = "text") -> str:
    """A block of code that the text cannot end."""
    text = text if len(text) <= 2000 else f"… {text[-2000:]}"
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", text)  # an untrained model says anything
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{kind}\n{text}\n{fence}"


def show(value) -> str:
    """A setting as a text: `True` → `true`, `None` → `none`, `["a", "b"]` → `a, b`."""
    value = value.value if isinstance(value, Enum) else value
    text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    return {"True": "true", "False": "false", "None": "none"}.get(text, text)
