"""Reads one turn of a conversation: text, tool calls, reasoning, and whether it is trained."""

import json
from typing import Any

from utils.data.bad_rows import BadRow, BrokenUnicode
from utils.data.fields import MEDIA
from utils.data.formats import is_empty
from utils.data.json_text import DECODER, from_json
from utils.template.messages import REASONING_FIELDS, Message

# fields that set by how much a turn is trained, OpenAI's first, and whether it is
WEIGHTS = ("weight", "loss_weight")
_LEAST = 1e-30  # of weights, which are kept in float32
TRAINING_MARKS = (*WEIGHTS, "loss", "train", "train_on_turn", "trainable")
# further names, whose meaning is not known: a mask of 1 may hide an answer or show it
_OTHER_MARKS = ("loss_mask", "mask", "masked", "ignore", "label")
_NAMES = ("name", "tool_call_id")
_TEXTS = {"content": "value", "value": "content"}  # the two names for the text of a turn
_PART = ("type", "text", "cache_control", "annotations")  # of a content in parts; the last two do not change the text
_CALL_ROLES = ("function_call", "tool_call")  # of a turn whose text is a call, or a list of calls, as JSON


def read_turn(turn: dict, role: str, role_field: str, text_field: str) -> Message:
    """Reads a turn whose role is known.

    `{"from": "gpt", "value": "Pear", "weight": 0}` → `{"role": "assistant", "content": "Pear", "train": False}`

    Other fields are kept as `extra`, since a template may render them.

    Raises:
        BadRow: a field has a value that is malformed or not supported.
    """
    message = {"role": role, "content": ""}
    if turn[role_field].strip().lower() in _CALL_ROLES:
        turn = _as_calls(turn, text_field)
    elif len(turn) == 2 and text_field in turn:
        return {**message, "content": _content(turn, text_field)}
    other = _TEXTS[text_field]
    if text_field in turn and not is_empty(turn.get(other)) and turn[other] != turn[text_field]:
        raise BadRow(f"has {other!r} beside {text_field!r}, and they differ; keep one of them")
    thoughts = {key: read_text(turn, key) for key in REASONING_FIELDS if not is_empty(turn.get(key))}
    calls = _all_calls(turn)
    if turn.get(text_field) is not None or not (thoughts or calls):
        message["content"] = _content(turn, text_field)
    message |= {"tool_calls": calls} if calls else {}
    message |= {key: read_text(turn, key) for key in _NAMES if turn.get(key) is not None}
    for key, text in thoughts.items():
        if text not in message.values():  # some servers write the same reasoning under two names
            message[key] = text
    weight = _read_weight(turn, role)
    if weight != 1 and role == "assistant":
        message["train"] = weight or False
    known = {role_field, *_TEXTS, "tool_calls", "function_call", *_NAMES, *TRAINING_MARKS, *REASONING_FIELDS}
    extra = {key: _as_json(value) for key, value in turn.items() if key not in known and not is_empty(value)}
    return {**message, "extra": extra} if extra else message


def _read_weight(turn: dict, role: str) -> float:
    """The weight of a turn's losses: 0 where a mark excludes it, 1 without marks."""
    for name in _OTHER_MARKS:
        if role == "assistant" and isinstance(turn.get(name), bool | int | float):
            raise BadRow(
                f"has {name!r} {turn[name]!r}, which is not read; remove it, or write 'train' with false for an answer "
                "that is not to be trained"
            )
    marks = {name: turn[name] for name in TRAINING_MARKS if not is_empty(turn.get(name))}
    for name, value in marks.items():
        if name in WEIGHTS:
            if not isinstance(value, int | float) or (value != 0 and not _LEAST <= value <= 1 / _LEAST):
                raise BadRow(f"has {name!r} {value!r}; give 0, or a number from {_LEAST} to {1 / _LEAST}, for its loss")
        elif value not in (0, 1):  # true and false, too
            raise BadRow(f"has {name!r} {value!r}; write true or false, or a number as its 'weight'")
        if value and role != "assistant":
            raise BadRow(f"({role}) has {name!r} {value!r}, a mark for answers of the assistant only; remove it")
    weights = {float(value) for name, value in marks.items() if name in WEIGHTS}
    if len({bool(value) for value in marks.values()}) > 1 or len(weights) > 1:
        raise BadRow(f"has marks that differ: {', '.join(f'{name!r} {value!r}' for name, value in marks.items())}")
    return weights.pop() if weights else float(all(marks.values()))


def _content(turn: dict, field: str) -> str:
    """The text of a turn, which may be a list of parts: `[{"type": "text", "text": "Hi"}]` → `"Hi"`.

    Parts are joined without anything between them, as the templates that take such lists do.
    """
    parts = turn.get(field)
    if not isinstance(parts, list):
        return read_text(turn, field)
    texts = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict) or part.get("type", "text") != "text" or "text" not in part:
            shown = repr(part["type"]) if isinstance(part, dict) and "type" in part else kind_name(part)
            raise BadRow(f"has in {field!r} a part of another kind than text ({shown}); {MEDIA}")
        if more := [name for name in part if name not in _PART and not is_empty(part[name])]:
            raise BadRow(f"has in {field!r} a part with {more[0]!r}, which is not read; remove it")
        texts.append(read_text(part, "text"))
    return "".join(texts)


def _as_calls(turn: dict, text_field: str) -> dict:
    """A turn of a call, with the call under the usual name in place of its text."""
    calls = from_json(turn.get(text_field))
    calls = [calls] if isinstance(calls, dict) else calls
    if not (isinstance(calls, list) and calls and all(isinstance(call, dict) for call in calls)):
        raise BadRow("is a tool call, and its text is neither a call nor a list of calls as JSON")
    if not is_empty(turn.get("tool_calls")):
        raise BadRow("is a tool call, and has 'tool_calls' as well; keep one of them")
    rest = {name: value for name, value in turn.items() if name not in _TEXTS}
    beside = turn.get(_TEXTS[text_field])  # a text beside the call
    return rest | {"tool_calls": calls} | ({} if is_empty(beside) else {text_field: beside})


def _all_calls(turn: dict) -> list[dict]:
    """The calls of a turn, also in OpenAI's older form `function_call`."""
    calls = [] if is_empty(turn.get("tool_calls")) else _calls(from_json(turn["tool_calls"]))
    if is_empty(turn.get("function_call")):
        return calls
    if calls:
        raise BadRow("has 'function_call' beside 'tool_calls'; keep one of them")
    return _calls([from_json(turn["function_call"])])


def _calls(calls: Any) -> list[dict]:
    """Parses tool calls, whose arguments may be objects or JSON text.

    `[{"function": {"name": "f", "arguments": "{\\"n\\": 3}"}}]`
    → `[{"function": {"name": "f", "arguments": {"n": 3}}}]`
    """
    if not isinstance(calls, list):
        raise BadRow(f"has {kind_name(calls)} in 'tool_calls', not a list")
    return [_wrapped(_call(call)) for call in calls]


def _wrapped(call: dict) -> dict:
    """A call in the form that chat templates take: `{"type": "function", "function": {"name": …, "arguments": …}}`."""
    if "function" in call or call.get("type", "function") != "function":
        return call
    inner = {name: call[name] for name in ("name", "arguments") if name in call}
    return {"type": "function"} | {name: call[name] for name in call if name not in inner} | {"function": inner}


def _call(call: Any) -> dict:
    if not isinstance(call, dict):
        raise BadRow(f"has {kind_name(call)} in 'tool_calls', not a call")
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    if call.get("type", "function") == "function" and not (isinstance(call.get("name"), str) and call["name"].strip()):
        raise BadRow("has a tool call without the name of a function")
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        if call.get("type", "function") == "function" and not isinstance(arguments, dict):
            found = "no arguments" if arguments is None else f"{kind_name(arguments)} as arguments"
            raise BadRow(f"has a tool call of {call['name']!r} with {found}; write an object, {{}} for none")
        return call
    try:
        parsed = DECODER.decode(arguments)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"has a tool call whose arguments are not JSON ({error}): {arguments[:40]!r}") from None
    if not isinstance(parsed, dict):
        raise BadRow(f"has a tool call whose arguments are {kind_name(parsed)}, not an object")
    return {**call, "arguments": parsed}


def _as_json(value: Any) -> Any:
    """Converts a value to JSON types; tables may contain dates and bytes."""
    return value if isinstance(value, str) else json.loads(json.dumps(value, default=str))


def read_text(row: dict, field: str) -> str:
    if field not in row:
        raise BadRow(f"has no field {field!r}")
    value = row[field]
    if not isinstance(value, str):
        raise BadRow(f"has {kind_name(value)} in {field!r} where text belongs")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BrokenUnicode(f"has half a Unicode character (a lone surrogate) in {field!r}") from None
    return value


def kind_name(value: Any) -> str:
    if isinstance(value, float) and value != value:
        return "NaN (an empty cell)"
    names: list[tuple[Any, str]] = [
        (type(None), "null"),
        (bool, "true or false"),
        (int | float, "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "an object"),
    ]
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)
