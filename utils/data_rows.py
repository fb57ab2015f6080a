"""Raw rows → conversations: the formats people have, and what is wrong with a row."""

from typing import Any

Message = dict[str, Any]

# what other programs call the roles
_ROLES = {
    "system": "system",
    "tool": "tool",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
FORMATS = (
    '{"instruction": …, "output": …} (with "input", "system", "history" if wanted), {"messages": […]} '
    'or {"conversations": […]}'
)


class BadRow(ValueError):
    """The row is malformed; the text completes "line N …"."""


class EmptyRow(BadRow):
    """The row is well-formed, but nothing in it could be trained."""


def to_messages(row: Any) -> list[Message]:
    """Reads one SFT row of any known format.

    `{"instruction": "Hi", "output": "Hello"}`
    → `[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]`

    Raises:
        BadRow: a field is missing or holds something other than text.
        EmptyRow: the answer is empty.
    """
    if not isinstance(row, dict):
        raise BadRow(f"is {_kind(row)}, not an object with fields")
    if "messages" in row:
        messages = _from_list(row["messages"], "messages", "role", "content")
    elif "conversations" in row:
        messages = _from_list(row["conversations"], "conversations", "from", "value")
    elif "instruction" in row or "output" in row:
        return _with_tools(_from_instruction(row), row.get("tools"))
    elif {"chosen", "rejected"} & set(row):
        raise BadRow("holds a preference pair (chosen, rejected), which is a row for DPO, not for SFT")
    elif "text" in row:
        raise BadRow('holds {"text": …}, which is a row for pretraining; use train_args/pretrain/base.py')
    else:
        raise BadRow(f"has the fields {sorted(map(str, row))}; needed is {FORMATS}")
    if row.get("system"):
        if messages[0]["role"] == "system":
            raise BadRow("has a field 'system' and a system turn as well; keep one of them")
        messages.insert(0, {"role": "system", "content": _text(row, "system")})
    _check_answers(messages)
    return _with_tools(messages, row.get("tools"))


def _check_answers(messages: list[Message]) -> None:
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("has no answer of the assistant to train")
    if not any(answer.strip() for answer in answers) and not any("tool_calls" in message for message in messages):
        raise EmptyRow("has an empty answer")


def to_text(row: Any) -> str:
    """Reads one pretraining row: `{"text": "…"}` → its text.

    Raises:
        BadRow: there is no text.
        EmptyRow: the text is blank.
    """
    if not isinstance(row, dict):
        raise BadRow(f"is {_kind(row)}, not an object with the field 'text'")
    if "text" not in row:
        raise BadRow(f'has the fields {sorted(map(str, row))}; pretraining needs {{"text": …}}')
    text = _text(row, "text")
    if not text.strip():
        raise EmptyRow("has an empty text")
    return text


def _from_instruction(row: dict) -> list[Message]:
    messages = []
    if row.get("system") is not None and _text(row, "system"):
        messages.append({"role": "system", "content": row["system"]})
    for turn, pair in enumerate(_history(row), 1):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow(f"has a history whose turn {turn} is not a pair of texts [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = _text(row, "instruction")
    if row.get("input") is not None and _text(row, "input"):
        question = f"{question}\n{row['input']}" if question else row["input"]
    output = _text(row, "output")
    if not question.strip():
        raise BadRow("has an empty instruction")
    if not output.strip():
        raise EmptyRow("has an empty output")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _history(row: dict) -> list:
    history = row.get("history")
    if history in (None, ""):
        return []
    if not isinstance(history, list):
        raise BadRow(f"has {_kind(history)} in 'history', not a list of [question, answer]")
    return history


def _from_list(turns: Any, field: str, role_key: str, text_key: str) -> list[Message]:
    if not isinstance(turns, list):
        raise BadRow(f"has {_kind(turns)} in {field!r}, not a list of turns")
    if not turns:
        raise BadRow(f"has an empty list in {field!r}")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise BadRow(f"turn {number} is {_kind(turn)}, not an object with {role_key!r} and {text_key!r}")
        # both spellings are in use under either name
        role_name, text_name = (role_key, text_key) if role_key in turn else _other_keys(role_key)
        role = turn.get(role_name)
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRow(f"turn {number} has the role {role!r}; allowed are {', '.join(_ROLES)}")
        try:
            messages.append({"role": _ROLES[role], **_said(turn, text_name)})
        except BadRow as error:
            raise BadRow(f"turn {number} {error}") from None
    return messages


def _said(turn: dict, field: str) -> dict:
    """A turn's text, or the tools it calls, with what names them."""
    extra = {
        key: _text(turn, key) for key in ("name", "tool_call_id", "reasoning_content") if turn.get(key) is not None
    }
    if not turn.get("tool_calls"):
        return {"content": _text(turn, field), **extra}
    if not isinstance(turn["tool_calls"], list):
        raise BadRow(f"has {_kind(turn['tool_calls'])} in 'tool_calls', not a list")
    content = "" if turn.get(field) is None else _text(turn, field)
    return {"content": content, "tool_calls": turn["tool_calls"], **extra}


def _with_tools(messages: list[Message], tools: Any) -> list[Message]:
    """The tools of a row go with its first message, whatever turns are cut away."""
    if tools in (None, []):
        return messages
    if not isinstance(tools, list):
        raise BadRow(f"has {_kind(tools)} in 'tools', not a list of tool descriptions")
    return [{**messages[0], "tools": tools}, *messages[1:]]


def _other_keys(role_key: str) -> tuple[str, str]:
    return ("from", "value") if role_key == "role" else ("role", "content")


def _text(row: dict, field: str) -> str:
    if field not in row:
        raise BadRow(f"has no field {field!r}")
    value = row[field]
    if not isinstance(value, str):
        raise BadRow(f"has {_kind(value)} in {field!r} where text belongs")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"has half a Unicode character (a lone surrogate) in {field!r}") from None
    return value


def _kind(value: Any) -> str:
    names: list[tuple[Any, str]] = [
        (type(None), "null"),
        (bool, "true or false"),
        (int | float, "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "an object"),
    ]
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)
