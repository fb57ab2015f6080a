"""A tokenizer's own chat template as a `Template`, read from what it renders, where the two render alike."""

from dataclasses import replace

from utils.runtime.errors import UserError
from utils.template.auto import AutoTemplate
from utils.template.dates import prints_date
from utils.template.format import Template
from utils.template.tokenize import special_pattern

_S, _U, _A, _V = "Ssystemtext", "Uusertext", "Aanswertext", "Vsecondtext"


def derive(tokenizer) -> Template | None:
    """Reads the pieces of a tokenizer's chat template from three conversations.

    A turn begins with a special token, and an answer ends with the template's stop token. Whoever calls this compares
    the renderings of more conversations, since a Jinja template may do anything else as well.

    Args:
        tokenizer: with a chat template.

    Returns:
        the template, named `auto`; None where the renderings have no such pieces, or print the day.
    """
    try:
        if prints_date(tokenizer):
            return None
        own = AutoTemplate.of(tokenizer)
        return _from_renderings(own, own.stop_token(), special_pattern(tokenizer), tokenizer.bos_token or "")
    except (UserError, ValueError):  # refused, or a piece that is not found
        return None


def _from_renderings(own: AutoTemplate, stop: str, special, bos: str) -> Template | None:
    """Raises a `ValueError` where a rendering lacks a piece."""
    system, user, second = (
        {"role": role, "content": text} for role, text in (("system", _S), ("user", _U), ("user", _V))
    )
    answer = {"role": "assistant", "content": _A}
    assistant = own.render([user], True).removeprefix(own.render([user]))
    turns = own.render([user, answer, second], True)
    between = _between(turns, _U, _A)
    where = between.index(assistant)
    after_user, before_answer = between[:where], between[where + len(assistant) :]
    tail = _between(turns, _A, _V)
    stop_at = tail.index(stop)
    after_answer, rest = tail[:stop_at], tail[stop_at + len(stop) :]
    opening = special.search(rest)  # of the second user's turn
    if opening is None or not assistant:
        return None
    after_stop, before_user = rest[: opening.start()], rest[opening.start() :]
    alone = own.render([user], True)
    head = alone[: alone.index(_U)].removesuffix(before_user)
    template = Template(
        name="auto", source="the tokenizer's own chat template", models=(),
        user=f"{before_user}{{content}}{after_user}", assistant=assistant, before_answer=before_answer,
        after_answer=after_answer, stop=stop, after_stop=after_stop, bos=head,
    )  # fmt: skip
    try:
        start = own.render([system, user], True)
    except UserError:
        return template  # without a system message
    if _S not in start:
        return template
    before_system = start[: start.index(_S)]
    after_system = _between(start, _S, _U).removesuffix(before_user)
    # a BOS token of its own stands before the special token that opens the turn
    first = bos if bos and special.match(before_system.removeprefix(bos)) and before_system.startswith(bos) else ""
    before_system = before_system.removeprefix(first)
    template = replace(template, bos=first, system=f"{before_system}{{content}}{after_system}")
    head = head.removeprefix(first)
    if head.startswith(before_system) and head.endswith(after_system) and head:
        default = head[len(before_system) : len(head) - len(after_system)]
        return replace(template, default_system=default)
    return template if not head else None


def _between(text: str, first: str, second: str) -> str:
    start = text.index(first) + len(first)
    return text[start : text.index(second, start)]
