"""Reads rows as prompts: any row format that can be trained on, with or without an answer."""

import json
from dataclasses import dataclass
from typing import Any

from loguru import logger

from utils.data.bad_rows import BadRow, unreadable
from utils.data.calls import order_results
from utils.data.columns import rename_raw
from utils.data.conversations import Message, as_list, converted, read_question, read_turns, with_system, with_tools
from utils.data.fields import prompt_problem, question_problem
from utils.data.files import find_files, read_rows
from utils.data.formats import CONVERSATION_FORMATS, Format, holds_turns, is_empty, read_json_fields, show_formats
from utils.data.pairs import check_prompt, is_pair, read_pair, usual_fields
from utils.data.turns import TRAINING_MARKS, kind_name, read_text
from utils.runtime.errors import Problem, UserError
from utils.template.messages import original_fields

PROMPT_FORMATS = f"{show_formats(CONVERSATION_FORMATS)}, with an answer or without, or a preference pair"


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


def read_prompts(paths: str, flag: str, columns: dict[str, str] | None = None) -> tuple[list[Prompt], list[Problem]]:
    """Reads the prompts of files, folders and globs, separated by commas.

    Args:
        paths: as given to `flag`.
        flag: the flag's name, for the messages.
        columns: name in a format → name in the files, from `parse_columns`.

    Returns:
        the prompts in the order of files and lines, and a problem for each other row, `"rows.jsonl:3 has …"`.

    Raises:
        UserError: a file is missing, or cannot be read to its end.
    """
    files, problems = find_files(paths, flag)
    if problems:
        raise UserError(*problems)
    prompts: list[Prompt] = []
    absent = set((columns or {}).values())
    for file in files:
        for raw in read_rows(file):
            absent -= raw.value.keys() if absent and isinstance(raw.value, dict) else set()
            raw = rename_raw(raw, columns or {})
            place = f"{file}:{raw.line}"
            if raw.fatal:
                raise UserError(f"{flag} {place} {raw.problem}")
            try:
                if raw.problem:
                    raise unreadable(raw)
                prompts.append(Prompt(file, raw.line, *to_prompt(raw.value)))
            except BadRow as error:
                problems.append(Problem(f"{place} {error}", file=file, line=raw.line))
    if absent:
        logger.warning("--columns names {}, which no row of {} has", " and ".join(map(repr, sorted(absent))), flag)
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
    row = read_json_fields(row)
    if problem := prompt_problem(row):
        raise BadRow(problem)
    row = usual_fields(row) if is_pair(row) else row
    messages, answer = _read(_without_training_marks(row))
    if not messages:
        raise BadRow("has an answer and no prompt before it")
    messages = order_results(messages)
    check_prompt(messages)
    if "reference" in row:
        answer = read_text(row, "reference")
    tools = with_tools(messages, row)[0].get("tools")
    try:
        json.dumps([messages, tools], ensure_ascii=False).encode()
    except (TypeError, UnicodeEncodeError) as error:  # such as a date from a Parquet file, or a lone surrogate
        raise BadRow(f"has something that JSON cannot hold ({error})") from None
    return [original_fields(message) for message in messages], tools, answer or None


def _without_training_marks(row: dict) -> dict:
    """Removes the marks that set which turns are trained, whatever their values: here nothing is trained."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) if isinstance(item, dict) else item for item in value]
        if isinstance(value, dict) and holds_turns(value):
            return {name: item for name, item in value.items() if name not in TRAINING_MARKS}
        return value

    return {name: plain(value) for name, value in row.items()}


def _read(row: dict) -> tuple[list[Message], str | None]:
    """The messages of a row up to the answer, and the answer."""
    if is_pair(row):
        prompt, chosen, _ = read_pair(row)
        return prompt, chosen[0]["content"] if chosen else None
    form = _question_format(row)
    if form is None:
        raise BadRow(f"has the fields {sorted(map(str, row))}; expected {PROMPT_FORMATS}")
    if form.turns:
        messages = read_turns(converted(row, form)[form.turns], form.turns)
    else:
        messages = read_question(row, form.question)
        if problem := question_problem(row, form, messages):
            raise BadRow(problem)
    if messages[-1]["role"] == "assistant":
        *messages, answer = messages
        reference = answer["content"]
    else:
        reference = _reference(row, form)
    return (with_system(messages, row) if form.turns and messages else messages), reference


def _reference(row: dict, form: Format) -> str | None:
    """The answer in a field beside the question, under any of the names that go with it."""
    answers = [name for other in CONVERSATION_FORMATS if other.question == form.question for name in other.answers]
    name = next((name for name in [*answers, "output"] if not is_empty(row.get(name))), None) if form.question else None
    if name is None:
        return None
    if not holds_turns(row[name]):
        return read_text(row, name)
    turns = read_turns(as_list(row[name]), name)
    return next((turn["content"] for turn in turns if turn["role"] == "assistant"), None)


def _question_format(row: dict) -> Format | None:
    """The first format whose question, or whole conversation, has a value in a row; or else is there without one."""
    found = [form for form in CONVERSATION_FORMATS if form.main[0] in row and (form.question or form.matches(row))]
    return next((form for form in found if not is_empty(row[form.main[0]])), found[0] if found else None)
