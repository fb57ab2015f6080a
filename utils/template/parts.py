"""A long conversation read part by part, where a template shows each part as it shows it within the whole."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from utils.runtime.errors import UserError
from utils.template.messages import UNREAD, Message

_PART = 16  # turns; a part ends before the next question
_AFTER = "\ue0ed"  # the question after a part, which no text of a format holds


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
    unread = dict.fromkeys(note for note in notes if note.kind == UNREAD)  # the system message stands in every part
    return readings[0]._replace(text=text, spans=spans, notes=[*unread, *(n for n in notes if n.kind != UNREAD)])


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
