"""Reads what a tokenizer's own chat template makes of a conversation: its text, its answers, what it leaves out."""

import functools
import json
import re
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from utils.runtime.errors import UserError
from utils.template.hidden_fields import (
    has_reasoning,
    hidden_fields,
    hidden_tool_fields,
    remove_fields,
    system_start,
    tools_start,
)
from utils.template.messages import (
    EMPTY_ANSWER,
    MEDIA_FIELDS,
    REASONING_FIELDS,
    UNREAD_FIELD,
    UNTRAINED_ANSWER,
    Message,
    RowNote,
    count_answers,
    is_empty_answer,
    is_trained_answer,
    unread_field_notes,
    weight_of,
)
from utils.template.spans import SpanNotFound, find_answer_span

_LATER = "has an answer before the {}, which the template shows only later in the conversation"
_FIELD_NAMES = {"content": "a content", "tool_calls": "a tool call", "<think>": "a thought in its content"}
_PLAIN_FIELDS = {"role", "content", "train"}
# a conversation is read twice: when its row is checked, and when its chunk of rows is encoded
_CACHE_SIZE = 2048
_PART_TURNS = 6  # a part has at least so many turns and ends before the next question
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_NEXT_QUESTION = "\ue0ed"  # the content of the question that follows a part; no chat format contains it


class Reading(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: the rendering.
        spans: start and end of each trained answer in it, stop token included.
        weights: of these answers.
        refused: why the row cannot be trained; None if it can.
        notes: answers that are not trained, and fields that are not rendered.
    """

    text: str
    spans: list[tuple[int, int]]
    weights: list[float]
    refused: str | None
    notes: list[RowNote]


@functools.lru_cache(_CACHE_SIZE)
def read_conversation(template, dumped: str) -> Reading:
    """Renders a conversation and locates its answers.

    Args:
        template: AutoTemplate.
        dumped: the messages as JSON, since arguments of a cached function must be hashable.

    Raises:
        UserError: the template refuses the conversation.
    """
    messages: list[Message] = json.loads(dumped)
    return (
        read_as_form(template, messages)
        or read_in_parts(template, messages, read_at_once)
        or read_at_once(template, messages)
    )


def read_as_form(template, messages: list[Message]) -> Reading | None:
    """Reads a plain conversation with one rendering, by the form that was derived from the template.

    Returns:
        None where that form renders another text, or the conversation has more than questions and answers.
    """
    if template.form is None or not _is_plain(messages) or _has_tags(template, messages):
        return None
    text, marks = template.render_with_marks(messages)
    try:
        segments = list(template.form.segments(messages))
    except UserError:
        return None
    if "".join(segment.text for segment in segments) != text:
        return None
    ends = list(accumulate(len(segment.text) for segment in segments))
    # an answer is two segments, its content and its stop token
    contents = [i for i, segment in enumerate(segments) if segment.answer and segment.content]
    found = [(ends[i] - len(segments[i].text), ends[i + 1], segments[i].trained) for i in contents]
    spans = [(start, end) for start, end, weight in found if weight > 0]
    if template.has_generation_marks() and not all(_is_marked(span, marks) for span in spans):
        return None
    return Reading(text, spans, [weight for *_, weight in found if weight > 0], None, [])


def _is_plain(messages: list[Message]) -> bool:
    """Whether a conversation has only texts: after a system message questions, each with at most one answer."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:] or not {*roles} <= {"system", "user", "assistant"}:
        return False
    if any(role == "assistant" and before != "user" for before, role in pairwise(["", *roles])):
        return False
    return all(
        message.keys() <= _PLAIN_FIELDS and message["content"].strip() and not has_reasoning(message)
        for message in messages
    )


def _has_tags(template, messages: list[Message]) -> bool:
    """Whether a content has a special token, or a tag that the template's text has, which it may treat otherwise.

    Qwen3.5's template looks for the last question that is not `<tool_response>…</tool_response>`.
    """
    contents = [message["content"] for message in messages]
    tags = {tag for content in contents for tag in _TAG.findall(content)}
    return any(tag in template.chat_template for tag in tags) or any(map(template.special.search, contents))


def _is_marked(span: tuple[int, int], marks: list[tuple[int, int]]) -> bool:
    return any(begin < span[1] and span[0] < end for begin, end in marks)


def read_at_once(template, messages: list[Message]) -> Reading:
    """As `read_conversation`, for a list of messages; renders the conversation anew for each answer."""
    text, marks = template.render_with_marks(messages)
    hidden = hidden_fields(messages, template.render, text)
    refused, lost, notes = _judge_hidden(template, messages, hidden)
    several = count_answers(messages) > 1
    starts = {"system message": system_start(messages, template.render, text)} if several else {}
    if messages[0].get("tools"):
        if refused is None and _drops_tools(template, messages, text):
            refused = f"turn 1 has tools, which {template.label} does not show"
        notes += _unread_in_tools(template, json.dumps(messages[0]["tools"], ensure_ascii=False))
        starts["tools"] = tools_start(messages, template.render)
    shown = remove_fields(messages, [field for field in hidden if field[0] in lost]) if lost else messages
    shown = shown if shown is messages or template.render(shown) == text else messages
    spans, weights, not_found = [], [], []
    for turn, message in enumerate(messages):
        if not is_trained_answer(message):
            continue
        reason = EMPTY_ANSWER if is_empty_answer(message) else lost.get(turn)
        if reason is None:
            try:
                span = _find_span(template, shown, turn, text, marks)
                reason = next((_LATER.format(what) for what, start in starts.items() if span[0] < start), None)
                spans += [] if reason else [span]
                weights += [] if reason else [weight_of(message)]
            except SpanNotFound as error:
                reason = f"has an answer that {error}"
                not_found.append(f"turn {turn + 1} {reason}")
        notes += [RowNote(UNTRAINED_ANSWER, reason)] if reason else []
    if not spans and not_found and refused is None:
        refused = f"no exact mask for {template.label}: {not_found[0]}"
    return Reading(text, spans, weights, refused, notes)


def _judge_hidden(
    template, messages: list[Message], hidden: list[tuple[int, str]]
) -> tuple[str | None, dict[int, str], list[RowNote]]:
    """Decides what follows from fields that are not rendered.

    Returns:
        why the row is refused, if it is; index of an answer that is not trained → why; notes of all other fields.
    """
    refused, lost, fields = None, {}, []
    for turn, field in hidden:
        message = messages[turn]
        name = _FIELD_NAMES.get(field, repr(field))
        if field == "name" or (field in message.get("extra", {}) and field not in (*REASONING_FIELDS, *MEDIA_FIELDS)):
            fields.append(field)
        elif message["role"] == "assistant" and _is_shown_last(template, messages[: turn + 1], field):
            lost[turn] = f"has an answer with {name} that the template shows only in the last turn"
        elif refused is None:
            role = message["role"]
            refused = f"turn {turn + 1} ({role}) has {name}, which {template.label} does not show"
    return refused, lost, unread_field_notes(fields)


def _is_shown_last(template, messages: list[Message], field: str) -> bool:
    """Whether a field of the last message is rendered."""
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
        return False  # the template refuses the conversation without tools, so it reads them


@functools.lru_cache(_CACHE_SIZE)
def _unread_in_tools(template, dumped: str) -> list[RowNote]:
    """Notes of the fields of tools that the template does not show; the tools as JSON."""
    messages = [{"role": "user", "content": "Q", "tools": json.loads(dumped)}, {"role": "assistant", "content": "A"}]
    try:
        text = template.render(messages)
    except UserError:  # tools alone, without the other turns
        return []
    return [RowNote(UNREAD_FIELD, name) for name in hidden_tool_fields(messages, template.render, text)]


def _find_span(template, messages: list[Message], turn: int, text: str, marks) -> tuple[int, int]:
    if template.exact_marks:
        return marks[count_answers(messages[:turn])]
    try:
        span = find_answer_span(messages, turn, text, template.render, template.special)
    except UserError as error:
        raise SpanNotFound("the template refuses without the turns that follow") from error
    if template.has_generation_marks() and not _is_marked(span, marks):
        raise SpanNotFound("the template's own generation marks leave out")
    return span


# ------------------------------------------------------------------------------ long conversations


def read_in_parts(template, messages: list[Message], read: Callable[[Any, list[Message]], Any]):
    """Reads a long conversation in parts, since reading it at once takes time quadratic in the number of turns.

    Each part is rendered after the system message and before one more question. The rendering of its own turns must
    equal, character by character, their rendering within the whole conversation; otherwise this returns None. That
    is so where a template treats the last question differently from all others.

    Args:
        template: AutoTemplate.
        messages: one conversation.
        read: template, messages → Reading.

    Returns:
        Reading of the whole conversation; None if it has to be read at once.
    """
    starts = _part_starts(messages)
    if len(starts) < 3:
        return None
    head = messages[: starts[0]]
    question = {"role": "user", "content": _NEXT_QUESTION}
    try:
        text = template.render(messages)
        before, found, _ = template.render(_build_part(messages, head, [question])).partition(_NEXT_QUESTION)
        if _NEXT_QUESTION in text or not found or not text.startswith(before):
            return None
        place, readings, spans = len(before), [], []
        for start, end in pairwise([*starts, len(messages)]):
            last = end == len(messages)
            turns = messages[start:end] if last else [*messages[start:end], question]
            reading = read(template, _build_part(messages, head, turns))
            shown, found, _ = reading.text.partition(_NEXT_QUESTION)
            own = shown[len(before) :]
            fits = shown.startswith(before) and text.startswith(own, place) and bool(found) != last
            if reading.refused or not fits or (last and place + len(own) != len(text)):
                return None
            spans += [(begin - len(before) + place, end - len(before) + place) for begin, end in reading.spans]
            place += len(own)
            readings.append(reading)
    except UserError:
        return None
    weights = [weight for reading in readings for weight in reading.weights]
    return readings[0]._replace(text=text, spans=spans, weights=weights, notes=_merge_notes(readings))


def _merge_notes(readings: list[Reading]) -> list[RowNote]:
    """Joins the notes of all parts; unread fields once, since the system message is in every part."""
    notes = [note for reading in readings for note in reading.notes]
    fields = dict.fromkeys(note for note in notes if note.kind == UNREAD_FIELD)
    return [*fields, *(note for note in notes if note.kind != UNREAD_FIELD)]


def _part_starts(messages: list[Message]) -> list[int]:
    """Returns where parts begin, each with a question after an answer; empty for a short conversation.

    It is empty as well if the first turn after a system message is not a question.
    """
    first = 0 if messages[0]["role"] == "user" else 1
    if len(messages) < 3 * _PART_TURNS or messages[first]["role"] != "user":
        return []
    starts = [first]
    for turn in range(first + 1, len(messages)):
        follows = messages[turn]["role"] == "user" and messages[turn - 1]["role"] == "assistant"
        if follows and turn - starts[-1] >= _PART_TURNS:
            starts.append(turn)
    return starts


def _build_part(messages: list[Message], head: list[Message], turns: list[Message]) -> list[Message]:
    """Puts turns after the system message; the first message holds the tools of the conversation."""
    part = [*head, *turns]
    return [{**part[0], "tools": messages[0]["tools"]}, *part[1:]] if messages[0].get("tools") else part
