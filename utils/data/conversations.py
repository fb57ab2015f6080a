"""Reads conversations from raw rows of all supported formats."""

from pathlib import Path
from typing import Any

from utils.data.bad_rows import BadRow, EmptyRow
from utils.data.fields import RECOGNISED_BY, conversation_kind, field_problem, is_empty
from utils.data.turns import kind_name, read_text, read_turn
from utils.template.messages import is_empty_answer

Message = dict[str, Any]

# names for the roles in other programs' data
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


class WrongTask(BadRow):
    """The row is one for another task."""

    def __init__(self, row: dict, needed: str):
        recipe = recipe_for(row)
        if recipe is None:
            super().__init__(f"has the fields {sorted(map(str, row))}; expected {needed}")
        else:
            super().__init__(
                f"looks like a row for {Path(recipe).parent.name}, not for this task; use --train_args_path {recipe}, "
                f"or rows of {needed}"
            )


def recipe_for(row: dict) -> str | None:
    """The recipe for the fields of a row: `{"text": …}` → `"train_args/pretrain/base.py"`; None if there is none."""
    return next((recipe for recipe, names in RECOGNISED_BY.items() if any(name in row for name in names)), None)


def to_messages(row: Any) -> list[Message]:
    """Reads one SFT row of any known format.

    `{"instruction": "Hi", "output": "Hello"}`
    → `[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]`

    Raises:
        BadRow: a field is missing or holds something other than text.
        EmptyRow: the answer is empty.
    """
    if not isinstance(row, dict):
        raise BadRow(f"is {kind_name(row)}, not an object with fields")
    kind = conversation_kind(row)
    if kind == "messages":
        messages = read_turns(row["messages"], "messages", "role", "content")
    elif kind == "conversations":
        messages = read_turns(row["conversations"], "conversations", "from", "value")
    elif kind == "instruction" or ("instruction" in row and recipe_for(row) is None):
        messages = _from_instruction(row)
        check_fields(row, "instruction", messages)
        return with_tools(messages, row.get("tools"))
    else:
        raise WrongTask(row, FORMATS)
    check_fields(row, kind, messages)
    messages = with_system(messages, row)
    _check_answers(messages)
    return with_tools(messages, row.get("tools"))


def check_fields(row: dict, kind: str, messages: list[Message]) -> None:
    """Raises a `BadRow` for a field that would be ignored although it matters; see `fields.field_problem`."""
    problem = field_problem(row, kind, messages)
    if problem:
        raise BadRow(problem)


def with_system(messages: list[Message], row: dict) -> list[Message]:
    """Puts the text of a row's field 'system' before the turns."""
    if is_empty(row.get("system")):
        return messages
    if messages[0]["role"] == "system":
        raise BadRow("has a field 'system' and a system turn as well; keep one of them")
    return [{"role": "system", "content": read_text(row, "system")}, *messages]


def _check_answers(messages: list[Message]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("has no answer of the assistant to train")
    if all(map(is_empty_answer, answers)):
        raise EmptyRow("has an empty answer")


def to_text(row: Any) -> str:
    """Reads one pretraining row: `{"text": "…"}` → its text.

    Raises:
        BadRow: there is no text.
        EmptyRow: the text is blank.
    """
    if not isinstance(row, dict):
        raise BadRow(f"is {kind_name(row)}, not an object with the field 'text'")
    if "text" not in row:
        raise WrongTask(row, '{"text": …}')
    text = read_text(row, "text")
    check_fields(row, "text", [])
    if not text.strip():
        raise EmptyRow("has an empty text")
    return text


def _from_instruction(row: dict) -> list[Message]:
    messages = read_question(row, "instruction")
    output = read_text(row, "output")
    if not output.strip():
        raise EmptyRow("has an empty output")
    return [*messages, {"role": "assistant", "content": output}]


def read_question(row: dict, field: str) -> list[Message]:
    """Reads a question from a text field, after the system message and the history if there are any.

    `{"instruction": "Add.", "input": "1, 2"}` → `[{"role": "user", "content": "Add.\\n1, 2"}]`
    """
    messages: list[Message] = []
    if not is_empty(row.get("system")):
        read_text(row, "system")
        messages.append({"role": "system", "content": row["system"]})
    for turn, pair in enumerate(_history(row), 1):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow(f"has a history whose turn {turn} is not a pair of texts [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = read_text(row, field)
    if not is_empty(row.get("input")):
        read_text(row, "input")
        question = f"{question}\n{row['input']}" if question else row["input"]
    if not question.strip():
        raise BadRow(f"has an empty {field}")
    return [*messages, {"role": "user", "content": question}]


def _history(row: dict) -> list:
    history = row.get("history")
    if is_empty(history):
        return []
    if not isinstance(history, list):
        raise BadRow(f"has {kind_name(history)} in 'history', not a list of [question, answer]")
    return history


def read_turns(turns: Any, field: str, role_key: str, text_key: str) -> list[Message]:
    if isinstance(turns, dict) and {"role", "from"} & turns.keys():
        raise BadRow(f"has one message in {field!r} where a list of them belongs; write it as [{{…}}]")
    if not isinstance(turns, list):
        raise BadRow(f"has {kind_name(turns)} in {field!r}, not a list of turns")
    if not turns:
        raise BadRow(f"has an empty list in {field!r}")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise BadRow(f"turn {number} is {kind_name(turn)}, not an object with {role_key!r} and {text_key!r}")
        # both spellings of the keys occur under either field name
        role_name, text_name = (role_key, text_key) if role_key in turn else _other_keys(role_key)
        role = turn.get(role_name)
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRow(f"turn {number} has the role {role!r}; allowed are {', '.join(_ROLES)}")
        try:
            messages.append(read_turn(turn, _ROLES[role], role_name, text_name))
        except BadRow as error:
            raise BadRow(f"turn {number} {error}") from None
    return messages


def with_tools(messages: list[Message], tools: Any) -> list[Message]:
    """Attaches the tools of a row to its first message."""
    if tools != {} and is_empty(tools):
        return messages
    if not isinstance(tools, list):
        raise BadRow(f"has {kind_name(tools)} in 'tools', not a list of tool descriptions")
    return [{**messages[0], "tools": tools}, *messages[1:]]


def _other_keys(role_key: str) -> tuple[str, str]:
    return ("from", "value") if role_key == "role" else ("role", "content")
