"""Reads conversations from raw rows of all supported formats."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.data.bad_rows import BadRow, EmptyRow
from utils.data.calls import check_called_functions, order_results
from utils.data.fields import field_problem
from utils.data.formats import (
    CONVERSATION_FORMATS,
    PAIR_FORMATS,
    SYSTEM_FIELDS,
    TEXT_FORMATS,
    TOOL_FIELDS,
    Format,
    find_format,
    holds_turns,
    is_empty,
    missing_fields,
    read_json_fields,
    show_formats,
)
from utils.data.turns import kind_name, read_text, read_turn
from utils.template.messages import is_empty_answer

Message = dict[str, Any]

# names for the roles in other programs' data, in lower case; those of a call have the call as their text
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
}
# field of a question → the fields with more of it, where it is not `input` alone
_MORE = {"instruction": ("input", "context"), "input": ()}
# recipe → the formats of its rows
_RECIPES = {
    "train_args/dpo/base.py": PAIR_FORMATS,
    "train_args/sft/base.py": CONVERSATION_FORMATS,
    "train_args/pretrain/base.py": TEXT_FORMATS,
}


class WrongTask(BadRow):
    """The row is one for another task."""

    def __init__(self, row: dict, formats: tuple[Format, ...]):
        recipe = recipe_for(row)
        if recipe is None:
            names = sorted(map(str, row))
            super().__init__(f"has the fields {names}; expected one of {show_formats(formats)}")
        else:
            task = Path(recipe).parent.name
            super().__init__(f"looks like a row for {task}, not for this task; use --train_args_path {recipe}")


def recipe_for(row: dict) -> str | None:
    """The recipe for the format of a row: `{"text": …}` → `"train_args/pretrain/base.py"`; None if there is none."""
    for recipe, formats in _RECIPES.items():
        form = find_format(row, formats)
        if form is not None and form.is_complete(row):
            return recipe
    return None


def to_messages(row: Any) -> list[Message]:
    """Reads one SFT row of any format in `CONVERSATION_FORMATS`.

    `{"instruction": "Hi", "output": "Hello"}`
    → `[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]`

    Raises:
        BadRow: a field is missing or holds something other than text.
        EmptyRow: the answer is empty.
    """
    if not isinstance(row, dict):
        raise BadRow(f"is {kind_name(row)}, not an object with fields")
    row = read_json_fields(row)
    form = find_format(row, CONVERSATION_FORMATS)
    if form is None or not form.is_complete(row):
        if form is None or recipe_for(row):
            raise WrongTask(row, CONVERSATION_FORMATS)
        raise BadRow(missing_fields(row, CONVERSATION_FORMATS))
    usual = converted(row, form)
    if form.turns:
        messages = with_system(read_turns(usual[form.turns], form.turns), row)
    else:
        messages = _from_question_and_answer(usual, form)
    check_fields(row, form, messages)
    _check_answers(messages)
    messages = with_tools(order_results(messages), row)
    check_called_functions(messages, messages[0].get("tools"))
    return messages


def converted(row: dict, form: Format) -> dict:
    """A row with its fields structured as those of most formats are; see `Format.convert`."""
    if form.convert is None:
        return row
    for name in form.main:
        if is_empty(row[name]):
            raise (EmptyRow if name in form.answers else BadRow)(f"has an empty {name!r}")
    try:
        return form.convert(row)
    except ValueError as error:
        raise BadRow(str(error)) from None


def check_fields(row: dict, form: Format, messages: list[Message]) -> None:
    """Raises a `BadRow` for a field that would be ignored although it matters; see `fields.field_problem`."""
    problem = field_problem(row, form, messages)
    if problem:
        raise BadRow(problem)


def filled_field(row: dict, names: Sequence[str]) -> str | None:
    """The name of the field that has a value, of a field with several names; None where none has.

    Raises:
        BadRow: two of them have values that differ.
    """
    found = None
    for name in names:
        if name in row and not is_empty(row[name]):
            if found is not None and row[name] != row[found]:
                raise BadRow(f"has {name!r} beside {found!r}, and they differ; keep one of them")
            found = found or name
    return found


def system_text(row: dict) -> str | None:
    """The system message in the fields of a row, which has several names; None without one."""
    name = filled_field(row, SYSTEM_FIELDS)
    return read_text(row, name) if name else None


def with_system(messages: list[Message], row: dict) -> list[Message]:
    """Puts the system message in the fields of a row before the turns."""
    text = system_text(row)
    if text is None:
        return messages
    if messages[0]["role"] == "system":
        raise BadRow("has a system message in a field and a system turn as well; keep one of them")
    return [{"role": "system", "content": text}, *messages]


def _check_answers(messages: list[Message]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("has no answer of the assistant to train")
    if all(map(is_empty_answer, answers)):
        raise EmptyRow("has an empty answer")


def to_text(row: Any) -> str:
    """Reads one pretraining row of any format in `TEXT_FORMATS`: `{"text": "…"}` → its text.

    Raises:
        BadRow: there is no text.
        EmptyRow: the text is blank.
    """
    if not isinstance(row, dict):
        raise BadRow(f"is {kind_name(row)}, not an object with the field 'text'")
    form = find_format(row, TEXT_FORMATS)
    if form is None:
        raise WrongTask(row, TEXT_FORMATS)
    text = read_text(row, form.texts[0])
    check_fields(row, form, [])
    if not text.strip():
        raise EmptyRow("has an empty text")
    return text


def _from_question_and_answer(row: dict, form: Format) -> list[Message]:
    messages = read_question(row, form.question)
    if holds_turns(row[form.question]):  # as in TRL, answers within the prompt belong to the question
        messages = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in messages]
    (name,) = form.answers
    if holds_turns(row[name]):
        return [*messages, *read_turns(as_list(row[name]), name)]
    text = read_text(row, name)
    if not text.strip():
        raise EmptyRow(f"has an empty {name}")
    return [*messages, {"role": "assistant", "content": text}]


def read_question(row: dict, field: str) -> list[Message]:
    """Reads a question from a field with a text or a list of turns.

    A text comes after the system message and the history if there are any, and before `input` or Dolly's `context`.

    `{"instruction": "Add.", "input": "1, 2"}` → `[{"role": "user", "content": "Add.\\n1, 2"}]`
    """
    if holds_turns(row.get(field)):
        if beside := [name for name in ("history", *_MORE.get(field, ("input",))) if not is_empty(row.get(name))]:
            raise BadRow(f"has {beside[0]!r} beside the turns in {field!r}, where it has no place; keep one of them")
        return with_system(read_turns(as_list(row[field]), field), row)
    system = system_text(row)
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages += _history(row)
    question = read_text(row, field)
    if name := filled_field(row, _MORE.get(field, ("input",))):
        question = f"{question}\n{read_text(row, name)}" if question else read_text(row, name)
    if not question.strip():
        raise BadRow(f"has an empty {field}")
    return [*messages, {"role": "user", "content": question}]


def as_list(turns: list | dict) -> list:
    return turns if isinstance(turns, list) else [turns]


def _history(row: dict) -> list[Message]:
    """The turns before the question: a list of pairs of texts, or of turns."""
    history = row.get("history")
    if is_empty(history):
        return []
    if not isinstance(history, list):
        raise BadRow(f"has {kind_name(history)} in 'history', not a list of [question, answer]")
    if holds_turns(history):
        return read_turns(history, "history")
    messages = []
    for turn, pair in enumerate(history, 1):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow(f"has a history whose turn {turn} is not a pair of texts [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def read_turns(turns: Any, field: str) -> list[Message]:
    """Reads a list of turns.

    Args:
        turns: the value of the field; both spellings of the keys occur in it, `role` and `content`, and ShareGPT's
            `from` and `value`.
        field: its name, for the messages.
    """
    if isinstance(turns, dict) and {"role", "from"} & turns.keys():
        raise BadRow(f"has one message in {field!r} where a list of them belongs; write it as [{{…}}]")
    if not isinstance(turns, list):
        raise BadRow(f"has {kind_name(turns)} in {field!r}, not a list of turns")
    if not turns:
        raise BadRow(f"has an empty list in {field!r}")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise BadRow(f"turn {number} is {kind_name(turn)}, not an object with 'role' and 'content'")
        role_name = "from" if "from" in turn and "role" not in turn else "role"
        usual = {"role": ("content", "value"), "from": ("value", "content")}[role_name]
        text_name = usual[1] if usual[1] in turn and usual[0] not in turn else usual[0]
        name = turn.get(role_name)
        role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            raise BadRow(f"turn {number} has the role {name!r}; allowed are {', '.join(ROLES)}")
        try:
            messages.append(read_turn(turn, role, role_name, text_name))
        except BadRow as error:
            raise BadRow(f"turn {number} {error}") from None
    return messages


def with_tools(messages: list[Message], row: dict) -> list[Message]:
    """Attaches the tools in the fields of a row to its first message.

    Tools may be described without the outer object, as in OpenAI's older `functions`.
    """
    name = filled_field(row, TOOL_FIELDS)
    if name is None:
        return messages
    tools = row[name]
    if not isinstance(tools, list):
        raise BadRow(f"has {kind_name(tools)} in 'tools', not a list of tool descriptions")
    return [{**messages[0], "tools": list(map(_wrapped, tools))}, *messages[1:]]


def _wrapped(tool: Any) -> dict:
    """A description of a tool in the form that chat templates take: `{"type": "function", "function": {…}}`."""
    if not isinstance(tool, dict):
        raise BadRow(
            f"has {kind_name(tool)} in 'tools' where the description of a function belongs: "
            '{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'
        )
    if tool.get("type", "function") != "function":
        return tool
    if "function" not in tool:
        tool = {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}
    function = tool["function"]
    if not (isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"].strip()):
        raise BadRow("has a tool without the name of a function in 'tools'")
    return tool
