"""What a tokenizer's own chat template makes of a conversation: its rendering, its answers, what it does not show."""

import copy
import functools
import json
import operator
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from utils.runtime.errors import UserError
from utils.template.messages import (
    EMPTY_ANSWER,
    MEDIA_FIELDS,
    METADATA_FIELDS,
    REASONING_FIELDS,
    UNREAD_FIELD,
    UNTRAINED_ANSWER,
    Message,
    RowNote,
    is_empty_answer,
    is_trained_answer,
    unread_field_notes,
)
from utils.template.spans import SpanNotFound, find_answer_span

# how thinking is written within a content
_THOUGHT = re.compile(r"</?think(?:ing)?>|</?thought>|\[/?THINK\]|<\|channel>|<channel\|>")
_PRIVATE = range(0xE100, 0xF8FF)  # private-use characters, which no text of a format holds

_PART = 16  # turns; a part ends before the next question
_AFTER = "\ue0ed"  # the question after a part, which no text of a format holds

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
    notes: list[RowNote]


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
    return read_in_parts(template, messages, read_at_once) or read_at_once(template, messages)


def read_at_once(template, messages: list[Message]) -> Reading:
    """As `read_conversation`, of messages, with a rendering up to each answer."""
    text, marks = template.render_with_marks(messages)
    hidden = hidden_fields(messages, template.render, text)
    refused, lost, notes = _judge(template, messages, hidden)
    if refused is None and messages[0].get("tools") and _drops_tools(template, messages, text):
        refused = "turn 1 has tools, which the tokenizer's chat template does not show"
    shown = remove_fields(messages, [place for place in hidden if place[0] in lost]) if lost else messages
    shown = shown if shown is messages or template.render(shown) == text else messages
    spans, unplaced = [], []
    for turn, message in enumerate(messages):
        if not is_trained_answer(message):
            continue
        reason = EMPTY_ANSWER if is_empty_answer(message) else lost.get(turn)
        if reason is None:
            try:
                spans.append(_span(template, shown, turn, text, marks))
            except SpanNotFound as error:
                reason = f"has an answer that {error}"
                unplaced.append(f"turn {turn + 1} {reason}")
        notes += [RowNote(UNTRAINED_ANSWER, reason)] if reason else []
    if not spans and unplaced and refused is None:
        refused = f"no exact mask for the tokenizer's chat template: {unplaced[0]}"
    return Reading(text, spans, refused, notes)


def _judge(
    template, messages: list[Message], hidden: list[tuple[int, str]]
) -> tuple[str | None, dict[int, str], list[RowNote]]:
    """What follows from texts that are not shown: the row is refused, an answer is not trained, or it is only noted."""
    refused, lost, fields = None, {}, []
    for turn, field in hidden:
        message = messages[turn]
        named = _NAMES.get(field, repr(field))
        if field == "name" or (field in message.get("extra", {}) and field not in (*REASONING_FIELDS, *MEDIA_FIELDS)):
            fields.append(field)
        elif message["role"] == "assistant" and _shown_last(template, messages[: turn + 1], field):
            lost[turn] = f"has an answer of which the template shows {named} only where no turn follows"
        elif refused is None:
            role = message["role"]
            refused = f"turn {turn + 1} ({role}) has {named}, which the tokenizer's chat template does not show"
    return refused, lost, unread_field_notes(fields)


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
        span = find_answer_span(messages, turn, text, template.render, template.special)
    except UserError as error:
        raise SpanNotFound("the template refuses without the turns that follow") from error
    if template.has_generation_marks() and not any(begin < span[1] and span[0] < end for begin, end in marks):
        raise SpanNotFound("the template's own generation marks leave out")
    return span


def read_in_parts(template, messages: list[Message], read: Callable[[Any, list[Message]], Any]):
    """Reads a conversation part by part, since reading one whole takes time that grows with the square of its turns.

    Each part stands behind the system message and before another question. Its rendering without these must be,
    character by character, what stands in the rendering of the whole; otherwise, as where a template sets something
    before the last question alone, the conversation is not read in parts.

    Args:
        template: AutoTemplate.
        messages: of one conversation.
        read: template, messages → Reading.

    Returns:
        Reading of the whole; None where it must be read as one.
    """
    starts = _starts(messages)
    if len(starts) < 3:
        return None
    head = messages[: starts[0]]
    try:
        text = template.render(messages)
        before, found, _ = template.render(_part(messages, head, [_asked()])).partition(_AFTER)
        if _AFTER in text or not found or not text.startswith(before):
            return None
        place, readings, spans = len(before), [], []
        for start, end in pairwise([*starts, len(messages)]):
            last = end == len(messages)
            turns = messages[start:end] if last else [*messages[start:end], _asked()]
            reading = read(template, _part(messages, head, turns))
            shown, found, _ = reading.text.partition(_AFTER)
            said = shown[len(before) :]
            fits = shown.startswith(before) and text.startswith(said, place) and bool(found) != last
            if reading.refused or not fits or (last and place + len(said) != len(text)):
                return None
            spans += [(begin - len(before) + place, end - len(before) + place) for begin, end in reading.spans]
            place += len(said)
            readings.append(reading)
    except UserError:
        return None
    notes = [note for reading in readings for note in reading.notes]
    unread = dict.fromkeys(
        note for note in notes if note.kind == UNREAD_FIELD
    )  # the system message stands in every part
    return readings[0]._replace(text=text, spans=spans, notes=[*unread, *(n for n in notes if n.kind != UNREAD_FIELD)])


def _starts(messages: list[Message]) -> list[int]:
    """Where the parts begin, each with a question that follows an answer; empty where the first one is no question."""
    first = 0 if messages[0]["role"] == "user" else 1
    if len(messages) < 3 * _PART or messages[first]["role"] != "user":
        return []
    starts = [first]
    for turn in range(first + 1, len(messages)):
        follows = messages[turn]["role"] == "user" and messages[turn - 1]["role"] == "assistant"
        if follows and turn - starts[-1] >= _PART:
            starts.append(turn)
    return starts


def _part(messages: list[Message], head: list[Message], turns: list[Message]) -> list[Message]:
    """The turns behind the system message; the tools stand with the first message."""
    part = [*head, *turns]
    return [{**part[0], "tools": messages[0]["tools"]}, *part[1:]] if messages[0].get("tools") else part


def _asked() -> Message:
    return {"role": "user", "content": _AFTER}


class TextPosition(NamedTuple):
    """The end of a piece of text in a conversation.

    Attributes:
        turn: the turn's place.
        path: keys and indices that lead to the text, `("tool_calls", 0, "function", "name")`.
        end: where in that text the piece ends.
        field: what the piece is called in a message.
    """

    turn: int
    path: tuple
    end: int
    field: str


def hidden_fields(messages: list[Message], render: Callable[[list[Message]], str], text: str) -> list[tuple[int, str]]:
    """The texts of a conversation that its rendering does not show.

    A character that stands nowhere else is set at the end of every text; where it does not come out again, and the
    rendering is the same with it alone, the text is not shown.

    Args:
        messages: of one conversation.
        render: messages → rendering; raises UserError.
        text: the rendering of `messages`.

    Returns:
        (turn, name of the field) of each; a thought within a content is named `<think>`.
    """
    places = [place for turn, message in enumerate(messages) for place in _places(turn, message)]
    dumped = json.dumps(messages, ensure_ascii=False)
    free = (char for char in map(chr, _PRIVATE) if char not in dumped)
    marks = dict(zip(places, free, strict=False))
    try:
        shown = render(_with_marks(messages, marks))
    except UserError:
        shown = ""
    missing = [place for place in places if place not in marks or marks[place] not in shown]
    hidden = [(place.turn, place.field) for place in _without_effect(missing, _with_x, messages, render, text)]
    others = [(turn, name) for turn, message in enumerate(messages) for name, value in _extra(message)
              if not isinstance(value, str)]  # fmt: skip
    hidden += _without_effect(others, _without_fields, messages, render, text)
    return list(dict.fromkeys(hidden))


def _without_effect(found: list, change: Callable, messages: list[Message], render, text: str) -> list:
    """Those whose change leaves the rendering as it is: tried all at once, then one by one."""

    def same(some: list) -> bool:
        try:
            return render(change(messages, some)) == text
        except UserError:
            return False  # refused without it, so it matters

    if not found or same(found):
        return found
    return [one for one in found if same([one])]


def remove_fields(messages: list[Message], hidden: list[tuple[int, str]]) -> list[Message]:
    """The conversation without texts that its rendering does not show."""
    kept = list(messages)
    for turn, field in hidden:
        message = dict(kept[turn])
        if field == "<think>":
            message["content"] = _THOUGHT.split(message["content"])[-1].lstrip("\n")
        elif field == "content":
            message["content"] = ""
        elif field in REASONING_FIELDS:
            message.pop(field, None)
            message["extra"] = {key: value for key, value in message.get("extra", {}).items() if key != field}
        kept[turn] = message
    return kept


def _places(turn: int, message: Message) -> Iterator[TextPosition]:
    content = message["content"]
    start = 0
    ends = [match.start() for match in _THOUGHT.finditer(content)] if message["role"] == "assistant" else []
    for number, end in enumerate([*ends, len(content)]):
        piece = content[start:end].rstrip()
        if piece and not _THOUGHT.fullmatch(piece):
            yield TextPosition(turn, ("content",), start + len(piece), "content" if number == len(ends) else "<think>")
        start = end
    for key, value in message.items():
        if (
            isinstance(value, str)
            and value.strip()
            and key in ("name", *REASONING_FIELDS)
            and message["role"] != "tool"
        ):
            yield TextPosition(turn, (key,), len(value.rstrip()), key)
    for key, value in _extra(message):
        if isinstance(value, str):
            yield TextPosition(turn, ("extra", key), len(value.rstrip()), key)
    for path, value in _leaves(message.get("tool_calls") or [], ("tool_calls",)):
        if value.strip() and path[-1] not in ("id", "type"):
            yield TextPosition(turn, path, len(value.rstrip()), "tool_calls")


def _extra(message: Message) -> list[tuple[str, Any]]:
    """The further fields that may say something."""
    return [(key, value) for key, value in message.get("extra", {}).items() if key not in METADATA_FIELDS]


def _leaves(value: Any, path: tuple) -> Iterator[tuple[tuple, str]]:
    if isinstance(value, str):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _leaves(item, (*path, key))


def _with_marks(messages: list[Message], marks: dict[TextPosition, str]) -> list[Message]:
    copied = copy.deepcopy(messages)
    for place, char in sorted(marks.items(), key=lambda item: -item[0].end):
        *way, last = place.path
        holder = functools.reduce(operator.getitem, way, copied[place.turn])
        holder[last] = holder[last][: place.end] + char + holder[last][place.end :]
    return copied


def _with_x(messages: list[Message], places: list[TextPosition]) -> list[Message]:
    return _with_marks(messages, dict.fromkeys(places, "x"))


def _without_fields(messages: list[Message], fields: list[tuple[int, str]]) -> list[Message]:
    changed = list(messages)
    for turn, field in fields:
        extra = {key: value for key, value in changed[turn]["extra"].items() if key != field}
        changed[turn] = {**changed[turn], "extra": extra}
    return changed
