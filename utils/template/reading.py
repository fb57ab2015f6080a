"""What a tokenizer's own chat template makes of a conversation: its rendering, its answers, what it does not show."""

import functools
import json
from typing import NamedTuple

from utils.runtime.errors import UserError
from utils.template.messages import (
    EMPTY,
    MEDIA,
    REASONING,
    UNTRAINED,
    Message,
    Note,
    hidden_fields,
    is_empty,
    is_wanted,
    unread,
    without,
)
from utils.template.parts import read_in_parts
from utils.template.spans import NoSpan, answer_span

_NAMES = {"content": "a content", "tool_calls": "a tool call", "<think>": "a thought in its content"}
# a conversation is read twice: when its row is checked, and with the rest of its chunk when it is encoded
_KEPT = 2048


class Reading(NamedTuple):
    """A conversation as a template shows it.

    Attributes:
        text: the rendering.
        spans: where each answer that is trained stands in it, with its stop token.
        refused: why the row cannot be trained, if it cannot.
        notes: which answers are not trained, and which fields are not shown.
    """

    text: str
    spans: list[tuple[int, int]]
    refused: str | None
    notes: list[Note]


@functools.lru_cache(_KEPT)
def read_conversation(template, dumped: str) -> Reading:
    """Renders a conversation, and finds its answers and what is not shown of it.

    Args:
        template: AutoTemplate.
        dumped: the messages as JSON.

    Raises:
        UserError: what the template refuses.
    """
    messages: list[Message] = json.loads(dumped)
    return read_in_parts(template, messages, read_whole) or read_whole(template, messages)


def read_whole(template, messages: list[Message]) -> Reading:
    """As `read_conversation`, of messages, with a rendering up to each answer."""
    text, marks = template.rendered(messages)
    hidden = hidden_fields(messages, template.render, text)
    refused, lost, notes = _judge(template, messages, hidden)
    if refused is None and messages[0].get("tools") and _drops_tools(template, messages, text):
        refused = "turn 1 has tools, which the tokenizer's chat template does not show"
    shown = without(messages, [place for place in hidden if place[0] in lost]) if lost else messages
    shown = shown if shown is messages or template.render(shown) == text else messages
    spans, unplaced = [], []
    for turn, message in enumerate(messages):
        if not is_wanted(message):
            continue
        reason = EMPTY if is_empty(message) else lost.get(turn)
        if reason is None:
            try:
                spans.append(_span(template, shown, turn, text, marks))
            except NoSpan as error:
                reason = f"has an answer that {error}"
                unplaced.append(f"turn {turn + 1} {reason}")
        notes += [Note(UNTRAINED, reason)] if reason else []
    if not spans and unplaced and refused is None:
        refused = f"no exact mask for the tokenizer's chat template: {unplaced[0]}"
    return Reading(text, spans, refused, notes)


def _judge(
    template, messages: list[Message], hidden: list[tuple[int, str]]
) -> tuple[str | None, dict[int, str], list[Note]]:
    """What follows from texts that are not shown: the row is refused, an answer is not trained, or it is only noted."""
    refused, lost, fields = None, {}, []
    for turn, field in hidden:
        message = messages[turn]
        named = _NAMES.get(field, repr(field))
        if field == "name" or (field in message.get("extra", {}) and field not in (*REASONING, *MEDIA)):
            fields.append(field)
        elif message["role"] == "assistant" and _shown_last(template, messages[: turn + 1], field):
            lost[turn] = f"has an answer of which the template shows {named} only where no turn follows"
        elif refused is None:
            role = message["role"]
            refused = f"turn {turn + 1} ({role}) has {named}, which the tokenizer's chat template does not show"
    return refused, lost, unread(fields)


def _shown_last(template, messages: list[Message], field: str) -> bool:
    """Whether the last turn of these shows a field of its own."""
    try:
        text = template.render(messages)
    except UserError:
        return False
    return (len(messages) - 1, field) not in hidden_fields(messages, template.render, text)


def _drops_tools(template, messages: list[Message], text: str) -> bool:
    bare = [{key: value for key, value in messages[0].items() if key != "tools"}, *messages[1:]]
    try:
        return template.render(bare) == text
    except UserError:
        return False  # refused without them, so they matter


def _span(template, messages: list[Message], turn: int, text: str, marks) -> tuple[int, int]:
    try:
        span = answer_span(messages, turn, text, template.render, template.special)
    except UserError as error:
        raise NoSpan("the template refuses without the turns that follow") from error
    if template.has_marks() and not any(begin < span[1] and span[0] < end for begin, end in marks):
        raise NoSpan("the template's own generation marks leave out")
    return span
