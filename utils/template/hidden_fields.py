"""Finds the texts of a conversation that a chat template does not render."""

import copy
import functools
import json
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from utils.runtime.errors import UserError
from utils.template.messages import METADATA_FIELDS, REASONING_FIELDS, Message

# tags around reasoning within a content
_REASONING_TAG = re.compile(r"</?think(?:ing)?>|</?thought>|\[/?THINK\]|<\|channel>|<channel\|>")
# fields of a tool that shape how the others are written, or are for servers and programs
_FORM_FIELDS = METADATA_FIELDS | {"required", "strict", "$schema"}
_MARKERS = range(0xE100, 0xF8FF)  # private-use characters, which no chat format contains


class TextPosition(NamedTuple):
    """The end of a piece of text in a conversation.

    Attributes:
        turn: index of the message.
        path: keys and indices that lead to the text, `("tool_calls", 0, "function", "name")`.
        end: where in that text the piece ends.
        field: name of the field; `<think>` for reasoning within a content.
    """

    turn: int
    path: tuple
    end: int
    field: str


def hidden_fields(messages: list[Message], render: Callable[[list[Message]], str], text: str) -> list[tuple[int, str]]:
    """Finds the fields that a rendering does not show.

    A unique character is inserted at the end of every text. A text is hidden if its character is missing from the new
    rendering and the rendering with another one there is unchanged.

    Args:
        messages: one conversation.
        render: messages → rendering; raises UserError.
        text: the rendering of `messages`.

    Returns:
        (index of the message, name of the field) of each; reasoning within a content is named `<think>`.
    """
    positions = [position for turn, message in enumerate(messages) for position in _positions(turn, message)]
    found = _not_shown(positions, _insert, _insert_x, messages, render, text)
    hidden = [(position.turn, position.field) for position in found]
    others = [(turn, name) for turn, message in enumerate(messages) for name, value in _extra_fields(message)
              if not isinstance(value, str)]  # fmt: skip
    hidden += _without_effect(others, _drop_extra_fields, messages, render, text)
    return list(dict.fromkeys(hidden))


def has_reasoning(message: Message) -> bool:
    """Whether the content of an answer has tags around reasoning."""
    return message["role"] == "assistant" and _REASONING_TAG.search(message["content"]) is not None


def remove_fields(messages: list[Message], hidden: list[tuple[int, str]]) -> list[Message]:
    """Returns the conversation without contents and reasoning that its rendering does not show.

    Args:
        messages: one conversation.
        hidden: some of what `hidden_fields` returned.
    """
    kept = list(messages)
    for turn, field in hidden:
        message = dict(kept[turn])
        if field == "<think>":
            message["content"] = _REASONING_TAG.split(message["content"])[-1].lstrip("\n")
        elif field == "content":
            message["content"] = ""
        elif field in REASONING_FIELDS:
            message.pop(field, None)
            message["extra"] = {key: value for key, value in message.get("extra", {}).items() if key != field}
        kept[turn] = message
    return kept


def hidden_tool_fields(messages: list[Message], render: Callable[[list[Message]], str], text: str) -> list[str]:
    """Finds the fields of tools that a rendering does not show; see `hidden_fields`.

    Args:
        messages: a conversation whose first message has the tools.
        render: messages → rendering; raises UserError.
        text: the rendering of `messages`.

    Returns:
        their names, such as `minimum (within a tool)`.
    """
    paths = [path for path, _ in _leaves(messages[0]["tools"], ()) if _key_of(path) not in _FORM_FIELDS]
    hidden = _not_shown(paths, _mark_tools, _change_tools, messages, render, text)
    # index of the tool, `function`, name of the field
    names = [f"{_key_of(path)} ({'of' if len(path) <= 3 else 'within'} a tool)" for path in hidden]
    return list(dict.fromkeys(names))


def tools_start(messages: list[Message], render: Callable[[list[Message]], str]) -> int:
    """Returns the position in the rendering of the first tool's name; 0 if that is not found."""
    paths = [path for path, _ in _leaves(messages[0]["tools"], ()) if path[1:] == ("function", "name")]
    mark = next(_unused_characters(messages))
    try:
        marked = render(_mark_tools(messages, dict.fromkeys(paths, mark)))
    except UserError:
        return 0
    return max(marked.find(mark), 0)


def system_start(messages: list[Message], render: Callable[[list[Message]], str], text: str) -> int:
    """Returns the position in a rendering of the system message at the start of a conversation; 0 if it is not found.

    Mistral's templates put it into the last question.

    Args:
        messages: one conversation.
        render: messages → rendering; raises UserError.
        text: the rendering of `messages`.
    """
    content = messages[0]["content"]
    first = next((message["content"].strip() for message in messages if message["role"] == "assistant"), "")
    if messages[0]["role"] != "system" or (start := text.find(content.strip())) < 0 or start < text.find(first):
        return 0  # before the first answer, as in nearly all templates
    mark = next(_unused_characters(messages))
    try:
        marked = render([{**messages[0], "content": content + mark}, *messages[1:]])
    except UserError:
        return 0
    return max(marked.find(mark) - len(content), 0)


def _leaves(value: Any, path: tuple) -> Iterator[tuple[tuple, Any]]:
    """Yields path and value of every text, number, truth value and null in nested lists and objects."""
    if not isinstance(value, dict | list):
        yield path, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(item, (*path, key))


def _key_of(path: tuple) -> str:
    """The name of the field that a path leads to, or to an item of."""
    return next((key for key in reversed(path) if isinstance(key, str)), "")


def _with_tools(messages: list[Message], changes: dict[tuple, Callable]) -> list[Message]:
    """Returns the messages with some leaves of the tools changed: path → (value → new value)."""
    tools = copy.deepcopy(messages[0]["tools"])
    for (*parents, last), change in changes.items():
        holder = functools.reduce(operator.getitem, parents, tools)
        holder[last] = change(holder[last])
    return [{**messages[0], "tools": tools}, *messages[1:]]


def _mark_tools(messages: list[Message], markers: dict[tuple, str]) -> list[Message]:
    return _with_tools(messages, {path: lambda value, char=char: f"{value}{char}" for path, char in markers.items()})


def _change_tools(messages: list[Message], paths: list[tuple]) -> list[Message]:
    return _with_tools(messages, dict.fromkeys(paths, _other_value))


def _other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}x"


def _unused_characters(messages: list[Message]) -> Iterator[str]:
    """Yields private-use characters that the messages do not contain."""
    dumped = json.dumps(messages, ensure_ascii=False)
    return (char for char in map(chr, _MARKERS) if char not in dumped)


def _not_shown(items: list, mark: Callable, change: Callable, messages: list[Message], render, text: str) -> list:
    """Returns the items that a rendering does not show: their characters are missing, and their change has no effect.

    Args:
        items: places in the messages.
        mark: messages, item → character → messages with each character at its item.
        change: messages, items → messages with other texts there.
        messages, render, text: as for `hidden_fields`.
    """
    markers = dict(zip(items, _unused_characters(messages), strict=False))
    try:
        marked = render(mark(messages, markers))
    except UserError:
        marked = ""
    missing = [item for item in items if item not in markers or markers[item] not in marked]
    return _without_effect(missing, change, messages, render, text)


def _without_effect(items: list, change: Callable, messages: list[Message], render, text: str) -> list:
    """Returns the items whose change leaves the rendering as it is; all are tried together first, then one by one."""

    def is_unchanged(some: list) -> bool:
        try:
            return render(change(messages, some)) == text
        except UserError:
            return False  # the template refuses the change, so it reads the item

    if not items or is_unchanged(items):
        return items
    return [item for item in items if is_unchanged([item])]


def _positions(turn: int, message: Message) -> Iterator[TextPosition]:
    """Yields the end of every text of a message; a content with reasoning has several."""
    content = message["content"]
    start = 0
    ends = [match.start() for match in _REASONING_TAG.finditer(content)] if message["role"] == "assistant" else []
    for number, end in enumerate([*ends, len(content)]):
        piece = content[start:end].rstrip()
        if piece and not _REASONING_TAG.fullmatch(piece):
            yield TextPosition(turn, ("content",), start + len(piece), "content" if number == len(ends) else "<think>")
        start = end
    named = ("name", *REASONING_FIELDS) if message["role"] != "tool" else ()
    for key, value in message.items():
        if key in named and isinstance(value, str) and value.strip():
            yield TextPosition(turn, (key,), len(value.rstrip()), key)
    for key, value in _extra_fields(message):
        if isinstance(value, str):
            yield TextPosition(turn, ("extra", key), len(value.rstrip()), key)
    for path, value in _leaves(message.get("tool_calls") or [], ("tool_calls",)):
        if isinstance(value, str) and value.strip() and path[-1] not in ("id", "type"):
            yield TextPosition(turn, path, len(value.rstrip()), "tool_calls")


def _extra_fields(message: Message) -> list[tuple[str, Any]]:
    """The additional fields that may have been meant for the model."""
    return [(key, value) for key, value in message.get("extra", {}).items() if key not in METADATA_FIELDS]


def _insert(messages: list[Message], markers: dict[TextPosition, str]) -> list[Message]:
    """Returns a copy of the messages with a character inserted at each position."""
    copied = copy.deepcopy(messages)
    for position, char in sorted(markers.items(), key=lambda item: -item[0].end):
        *parents, last = position.path
        holder = functools.reduce(operator.getitem, parents, copied[position.turn])
        holder[last] = holder[last][: position.end] + char + holder[last][position.end :]
    return copied


def _insert_x(messages: list[Message], positions: list[TextPosition]) -> list[Message]:
    return _insert(messages, dict.fromkeys(positions, "x"))


def _drop_extra_fields(messages: list[Message], fields: list[tuple[int, str]]) -> list[Message]:
    changed = list(messages)
    for turn, field in fields:
        extra = {key: value for key, value in changed[turn]["extra"].items() if key != field}
        changed[turn] = {**changed[turn], "extra": extra}
    return changed
