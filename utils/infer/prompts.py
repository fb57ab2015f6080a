"""Reads rows as prompts: any row format that can be trained on, with or without an answer."""

import json
from dataclasses import dataclass
from typing import Any

from utils.data.bad_rows import BadRow, unreadable
from utils.data.conversations import (
    Message,
    check_fields,
    kind_name,
    read_question,
    read_text,
    read_turns,
    with_system,
    with_tools,
)
from utils.data.files import find_files, read_rows
from utils.data.pairs import check_prompt, read_pair
from utils.data.turns import TRAINING_MARKS
from utils.runtime.errors import Problem, UserError
from utils.template.messages import original_fields

PROMPT_FORMATS = (
    '{"instruction": …} (with "input", "system", "history" if wanted), {"messages": […]} or {"conversations": […]}, '
    '{"prompt": …} as a text or a list of turns, or a preference pair'
)
_TURNS = ("messages", "conversations", "prompt", "chosen", "rejected", "reject")  # fields that may hold turns


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer, with its origin.

    Attributes:
        file: the file it was read from.
        line: the line in it, or the number of the row in a table.
        messages: the conversation up to the answer; the last turn is the user's or a tool's.
        tools: descriptions of tools, if the row has any.
        reference: the answer in the row, if there is one.
    """

    file: str
    line: int
    messages: list[Message]
    tools: list | None
    reference: str | None


def read_prompts(paths: str, flag: str) -> tuple[list[Prompt], list[Problem]]:
    """Reads the prompts of files, folders and globs, separated by commas.

    Args:
        paths: as given to `flag`.
        flag: the flag's name, for the messages.

    Returns:
        the prompts in the order of files and lines, and a problem for each other row, `"rows.jsonl:3 has …"`.

    Raises:
        UserError: a file is missing, or cannot be read to its end.
    """
    files, problems = find_files(paths, flag)
    if problems:
        raise UserError(*problems)
    prompts: list[Prompt] = []
    for file in files:
        for raw in read_rows(file):
            place = f"{file}:{raw.line}"
            if raw.fatal:
                raise UserError(f"{flag} {place} {raw.problem}")
            try:
                if raw.problem:
                    raise unreadable(raw)
                prompts.append(Prompt(file, raw.line, *to_prompt(raw.value)))
            except BadRow as error:
                problems.append(Problem(f"{place} {error}", file=file, line=raw.line))
    return prompts, problems


def to_prompt(row: Any) -> tuple[list[Message], list | None, str | None]:
    """Reads one row: the messages up to the answer, the tools, and the answer.

    `{"instruction": "Hi", "output": "Hello"}` → `([{"role": "user", "content": "Hi"}], None, "Hello")`

    The answer is the field `reference`, or else the last turn if it is the assistant's, the output, or the
    chosen answer of a preference pair.

    Raises:
        BadRow: there is nothing to answer, or a field does not hold text.
    """
    if not isinstance(row, dict):
        raise BadRow(f"is {kind_name(row)}, not an object with fields")
    row = {name: value for name, value in row.items() if value is not None}  # tables have every column in every row
    check_fields(row, "prompt", [])
    messages, answer = _read(_without_training_marks(row))
    if not messages:
        raise BadRow("has an answer and no prompt before it")
    check_prompt(messages)
    if "reference" in row:
        answer = read_text(row, "reference")
    tools = with_tools(messages, row.get("tools"))[0].get("tools")
    try:
        json.dumps([messages, tools], ensure_ascii=False).encode()
    except (TypeError, UnicodeEncodeError) as error:  # such as a date from a Parquet file, or a lone surrogate
        raise BadRow(f"has something that JSON cannot hold ({error})") from None
    return [original_fields(message) for message in messages], tools, answer or None


def _without_training_marks(row: dict) -> dict:
    """Removes the marks that set which turns are trained, whatever their values: here nothing is trained."""

    def plain(turn: Any) -> Any:
        marked = isinstance(turn, dict) and not turn.keys().isdisjoint(TRAINING_MARKS)
        return {key: value for key, value in turn.items() if key not in TRAINING_MARKS} if marked else turn

    return {
        name: value if name not in _TURNS else [*map(plain, value)] if isinstance(value, list) else plain(value)
        for name, value in row.items()
    }


def _read(row: dict) -> tuple[list[Message], str | None]:
    if any(name in row for name in ("chosen", "rejected", "reject")):
        prompt, chosen, _ = read_pair(row)
        return prompt, chosen[0]["content"] if chosen else None
    for name, role, text in (("messages", "role", "content"), ("conversations", "from", "value"),
                             ("prompt", "role", "content")):  # fmt: skip
        if name in row and (name != "prompt" or not isinstance(row[name], str)):
            turns = read_turns(row[name], name, role, text)
            last = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
            return (with_system(turns, row) if turns else turns), last
    for name in ("prompt", "instruction"):
        if name in row:
            return read_question(row, name), read_text(row, "output") if "output" in row else None
    raise BadRow(f"has the fields {sorted(map(str, row))}; expected {PROMPT_FORMATS}")
