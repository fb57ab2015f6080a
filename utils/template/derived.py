"""Derives a `Template` from what a tokenizer's own chat template renders."""

import re
from dataclasses import replace

from utils.runtime.errors import UserError
from utils.template.format import Template

# the texts that are found again in a rendering
_SYSTEM, _USER, _ANSWER, _SECOND = "Ssystemtext", "Uusertext", "Aanswertext", "Vsecondtext"


def from_renderings(own, stop: str, special: re.Pattern, bos: str) -> Template | None:
    """Derives a `Template` from the renderings of three conversations.

    Args:
        own: the tokenizer's template, an AutoTemplate.
        stop: the token that ends an answer.
        special: matches the text of any special token.
        bos: the BOS token; empty if there is none.

    Returns:
        the template, named `auto`; None if the renderings have another structure.

    Raises:
        ValueError: a rendering lacks a piece.
    """
    user, second = ({"role": "user", "content": text} for text in (_USER, _SECOND))
    answer = {"role": "assistant", "content": _ANSWER}
    prompt = own.render([user], True)
    assistant = prompt.removeprefix(own.render([user]))
    turns = own.render([user, answer, second], True)
    after_user, before_answer = _cut(_between(turns, _USER, _ANSWER), assistant)
    after_answer, rest = _cut(_between(turns, _ANSWER, _SECOND), stop)
    opening = special.search(rest)  # of the second user's turn
    if opening is None or not assistant:
        return None
    after_stop, before_user = rest[: opening.start()], rest[opening.start() :]
    head = prompt[: prompt.index(_USER)].removesuffix(before_user)
    template = Template(
        name="auto", source="the tokenizer's own chat template", models=(),
        user=f"{before_user}{{content}}{after_user}", assistant=assistant, before_answer=before_answer,
        after_answer=after_answer, stop=stop, after_stop=after_stop, bos=head,
    )  # fmt: skip
    return _with_system(template, own, before_user, special, bos)


def _with_system(template: Template, own, before_user: str, special: re.Pattern, bos: str) -> Template | None:
    """Adds the forms of a system message and of the default one; None where the renderings contradict each other.

    Args:
        template: without a system message; its `bos` is all that a rendering without one begins with.
        own: the tokenizer's template.
        before_user: what precedes the content of a user's turn.
        special: matches the text of any special token.
        bos: the BOS token; empty if there is none.
    """
    try:
        start = own.render([{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}], True)
    except UserError:
        return template  # without a system message
    if _SYSTEM not in start:
        return template
    before_system = start[: start.index(_SYSTEM)]
    after_system = _between(start, _SYSTEM, _USER).removesuffix(before_user)
    # the BOS token stands before the special token that opens the system turn
    first = bos if bos and special.match(before_system.removeprefix(bos)) and before_system.startswith(bos) else ""
    before_system, head = before_system.removeprefix(first), template.bos.removeprefix(first)
    template = replace(template, bos=first, system=f"{before_system}{{content}}{after_system}")
    if head.startswith(before_system) and head.endswith(after_system) and head:
        default = head[len(before_system) : len(head) - len(after_system)]
        return replace(template, default_system=default)
    return template if not head else None


def _between(text: str, first: str, second: str) -> str:
    start = text.index(first) + len(first)
    return text[start : text.index(second, start)]


def _cut(text: str, separator: str) -> tuple[str, str]:
    """As `str.partition`, but raises a `ValueError` if the separator is missing."""
    start = text.index(separator)
    return text[:start], text[start + len(separator) :]
