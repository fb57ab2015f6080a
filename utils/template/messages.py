"""What a turn of a conversation holds beside its text, and which answers are trained."""

import copy
import functools
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from utils.runtime.errors import UserError

# fields that describe a row and say nothing that could be trained
DESCRIPTIVE = frozenset(
    "id _id idx index uid uuid key hash prompt_id conversation_id conversation_hash row_id question_id "
    "source sources dataset data_source origin origin_dataset original_dataset repo file file_path path dump url "
    "category categories domain subject topic topics task task_type type lang language languages language_score "
    "tag tags meta metadata info extra version split subset license licence author authors created created_at date "
    "time timestamp updated_at model models model_name generator teacher tokens token_count num_tokens n_tokens "
    "length num_turns title parallel_tool_calls score_chosen score_rejected chosen_model rejected_model "
    "__index_level_0__ difficulty level".split()
    + ["", "Unnamed: 0"]  # pandas' index, written as a column
)
# what programs call the thinking of an answer; transformers gives a template all of the first three
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")

Message = dict[str, Any]
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# how thinking is written within a content
_THOUGHT = re.compile(r"</?think(?:ing)?>|</?thought>|\[/?THINK\]|<\|channel>|<channel\|>")
_PRIVATE = range(0xE100, 0xF8FF)  # private-use characters, which no text of a format holds


class Note(NamedTuple):
    """Something about a row that is trained on, for the report.

    Attributes:
        kind: `UNTRAINED` for an answer that is not trained, `UNREAD` for a field of a turn that no token shows.
        reason: completes "line N …"; the name of the field.
    """

    kind: str
    reason: str


UNTRAINED, UNREAD = "untrained", "unread"
EMPTY = "has an empty answer"


def is_empty(message: Message) -> bool:
    """Whether an answer neither says nor calls anything."""
    return not (message["content"].strip() or message.get("tool_calls") or any(map(message.get, REASONING)))


def is_wanted(message: Message) -> bool:
    """Whether a turn is an answer that the row does not mark as one not to be trained, and `only_answers` neither."""
    return message["role"] == "assistant" and message.get("train") is not False


def only_answers(messages: list[Message], train_on: str | int) -> list[Message]:
    """Marks every answer but those of `train_on` as one that is not trained.

    Args:
        messages: of one conversation.
        train_on: `all_turns`, `last_turn`, or how many of the last answers.
    """
    if train_on == "all_turns":
        return messages
    count = 1 if train_on == "last_turn" else int(train_on)
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"][:-count]
    return [{**message, "train": False} if turn in answers else message for turn, message in enumerate(messages)]


def unread(fields: Iterable[str]) -> list[Note]:
    """Notes of fields that no token shows, each once, without those that only describe a turn."""
    return [Note(UNREAD, f"{field} (of a turn)") for field in dict.fromkeys(fields) if field not in DESCRIPTIVE]


def count_answers(messages: list[Message]) -> int:
    """How many of the turns are the assistant's."""
    return sum(message["role"] == "assistant" for message in messages)


def as_written(message: Message) -> Message:
    """A turn as the row has it: without what this project sets into it, and with its further fields."""
    kept = {key: value for key, value in message.items() if key not in ("tools", "train", "extra")}
    return kept | message.get("extra", {})


# ------------------------------------------------------------------------------ what a rendering shows


class Place(NamedTuple):
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


def without(messages: list[Message], hidden: list[tuple[int, str]]) -> list[Message]:
    """The conversation without texts that its rendering does not show."""
    kept = list(messages)
    for turn, field in hidden:
        message = dict(kept[turn])
        if field == "<think>":
            message["content"] = _THOUGHT.split(message["content"])[-1].lstrip("\n")
        elif field == "content":
            message["content"] = ""
        elif field in REASONING:
            message.pop(field, None)
            message["extra"] = {key: value for key, value in message.get("extra", {}).items() if key != field}
        kept[turn] = message
    return kept


def _places(turn: int, message: Message) -> Iterator[Place]:
    content = message["content"]
    start = 0
    ends = [match.start() for match in _THOUGHT.finditer(content)] if message["role"] == "assistant" else []
    for number, end in enumerate([*ends, len(content)]):
        piece = content[start:end].rstrip()
        if piece and not _THOUGHT.fullmatch(piece):
            yield Place(turn, ("content",), start + len(piece), "content" if number == len(ends) else "<think>")
        start = end
    for key, value in message.items():
        if isinstance(value, str) and value.strip() and key in ("name", *REASONING) and message["role"] != "tool":
            yield Place(turn, (key,), len(value.rstrip()), key)
    for key, value in _extra(message):
        if isinstance(value, str):
            yield Place(turn, ("extra", key), len(value.rstrip()), key)
    for path, value in _leaves(message.get("tool_calls") or [], ("tool_calls",)):
        if value.strip() and path[-1] not in ("id", "type"):
            yield Place(turn, path, len(value.rstrip()), "tool_calls")


def _extra(message: Message) -> list[tuple[str, Any]]:
    """The further fields that may say something."""
    return [(key, value) for key, value in message.get("extra", {}).items() if key not in DESCRIPTIVE]


def _leaves(value: Any, path: tuple) -> Iterator[tuple[tuple, str]]:
    if isinstance(value, str):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _leaves(item, (*path, key))


def _with_marks(messages: list[Message], marks: dict[Place, str]) -> list[Message]:
    copied = copy.deepcopy(messages)
    for place, char in sorted(marks.items(), key=lambda item: -item[0].end):
        *way, last = place.path
        holder = functools.reduce(operator.getitem, way, copied[place.turn])
        holder[last] = holder[last][: place.end] + char + holder[last][place.end :]
    return copied


def _with_x(messages: list[Message], places: list[Place]) -> list[Message]:
    return _with_marks(messages, dict.fromkeys(places, "x"))


def _without_fields(messages: list[Message], fields: list[tuple[int, str]]) -> list[Message]:
    changed = list(messages)
    for turn, field in fields:
        extra = {key: value for key, value in changed[turn]["extra"].items() if key != field}
        changed[turn] = {**changed[turn], "extra": extra}
    return changed
