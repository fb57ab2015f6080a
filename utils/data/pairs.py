"""Reads preference pairs: a prompt with a chosen and a rejected answer."""

from typing import Any

from utils.data.bad_rows import BadRow, EmptyRow, EqualPair
from utils.data.calls import check_called_functions, order_results
from utils.data.conversations import (
    Message,
    WrongTask,
    check_fields,
    converted,
    filled_field,
    read_question,
    read_turns,
    with_system,
    with_tools,
)
from utils.data.formats import PAIR_FORMATS, Format, find_format, is_empty, missing_fields, read_json_fields
from utils.data.turns import kind_name, read_text
from utils.template.messages import is_empty_answer, weight_of

# fields with the prompt of a pair: as turns, and as a text or turns
_TURNS, _QUESTIONS = ("messages", "conversations"), ("prompt", "instruction", "question")
Pair = dict[str, list[Message]]


def to_pair(row: Any) -> Pair:
    """Reads one preference pair of any format in `PAIR_FORMATS`.

    `{"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}`
    → `{"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Hello"}],
    "rejected": [{"role": "assistant", "content": "What?"}]}`

    Raises:
        BadRow: a field is missing, or the two do not answer the same prompt.
        EmptyRow: an answer is empty.
        EqualPair: chosen and rejected are the same.
    """
    if not isinstance(row, dict):
        raise BadRow(f"is {kind_name(row)}, not an object with fields")
    row = _usual_names(row)
    form = _format_of(row)
    usual = converted(row, form)
    prompt, chosen, rejected = read_pair(usual)
    check_fields(row, form, [*prompt, *chosen, *rejected])
    _check_scores(row)
    check_prompt(prompt)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(name, answer)
    if _bare(chosen) == _bare(rejected):
        raise EqualPair("has chosen equal to rejected")
    prompt = with_tools(prompt, usual)
    # a rejected answer may be rejected because of the function it calls
    check_called_functions(chosen, prompt[0].get("tools"), len(prompt))
    chosen, rejected = (order_results([*prompt, *answer])[len(prompt) :] for answer in (chosen, rejected))
    return {"prompt": order_results(prompt), "chosen": chosen, "rejected": rejected}


def read_pair(row: dict) -> tuple[list[Message], list[Message], list[Message]]:
    """Returns the prompt and the two answers of a row, which may still be empty or equal.

    Args:
        row: from `usual_fields`.

    Raises:
        BadRow: a field is missing, or the two do not answer the same prompt.
    """
    prompt = _with_their_system(_read_prompt(row), row)
    chosen, rejected = (_read_answer(row, name, prompt) for name in ("chosen", "rejected"))
    if prompt is None:
        prompt, chosen, rejected = _split(chosen, rejected)
        prompt = with_system(prompt, row)
    return prompt, chosen, rejected


def is_pair(row: dict) -> bool:
    """Whether a row is a preference pair, or lacks only one of its answers."""
    if any(not is_empty(row.get(name)) for name in ("chosen", "rejected", "reject")):
        return True
    form = find_format(row, PAIR_FORMATS)
    return form is not None and form.filled(row) == 1


def _usual_names(row: dict) -> dict:
    """A row whose rejected answer has its usual name, and without `messages` where they repeat an answer."""
    row = read_json_fields(row)
    if "reject" in row:
        filled_field(row, ("rejected", "reject"))  # raises where both have a value and they differ
        kept = "reject" if is_empty(row.get("rejected")) else "rejected"
        rest = {name: value for name, value in row.items() if name not in ("rejected", "reject")}
        row = rest | {"rejected": row[kept]}
    if repeats_answer(row):
        row = {name: value for name, value in row.items() if name != "messages"}
    return row


def repeats_answer(row: dict) -> bool:
    """Whether the field `messages` of a pair is one of its answers once more, as in UltraFeedback."""
    return {"messages", "chosen", "rejected"} <= row.keys() and row["messages"] in (row["chosen"], row["rejected"])


def _format_of(row: dict) -> Format:
    form = find_format(row, PAIR_FORMATS)
    if form is not None and form.is_complete(row):
        return form
    if form is None or not {"chosen", "rejected"} & row.keys():
        raise WrongTask(row, PAIR_FORMATS)
    raise BadRow(missing_fields(row, PAIR_FORMATS))


def usual_fields(row: dict) -> dict:
    """A pair of any format with its fields in the usual structure, the answers as `chosen` and `rejected`."""
    row = _usual_names(row)
    return converted(row, _format_of(row))


def _read_prompt(row: dict) -> list[Message] | None:
    """Returns the turns before the answers; None if only the conversations of both sides contain them."""
    turns = [name for name in _QUESTIONS if isinstance(row.get(name), list) and row[name]]
    turns += [name for name in _TURNS if not is_empty(row.get(name))]
    for name in turns[:1]:
        _refuse_beside(row, name, *_TURNS, *_QUESTIONS, "input", "context", "history")
        return with_system(read_turns(row[name], name), row)
    questions = [name for name in _QUESTIONS if not is_empty(row.get(name))]
    if not questions and not (isinstance(row["chosen"], list) and isinstance(row["rejected"], list)):
        questions = [name for name in _QUESTIONS if name in row]
    for name in questions[:1]:
        _refuse_beside(row, name, *_QUESTIONS)
        return read_question(row, name)
    return None


def _refuse_beside(row: dict, name: str, *others: str) -> None:
    """Refuses a second field that could be the prompt."""
    for other in others:
        if other != name and not is_empty(row.get(other)) and row[other] != row[name]:
            raise BadRow(f"has {other!r} beside {name!r}, which is the prompt already; keep one of them")


def _with_their_system(prompt: list[Message] | None, row: dict) -> list[Message] | None:
    """Moves a system turn that both answers begin with to the prompt."""
    begins = [row[side][0] for side in ("chosen", "rejected") if isinstance(row[side], list) and row[side]]
    alike = len(begins) == 2 and begins[0] == begins[1] and isinstance(begins[0], dict)
    if prompt is None or prompt[0]["role"] == "system" or not alike or begins[0].get("role") != "system":
        return prompt
    return [*read_turns(begins[:1], "chosen"), *prompt]


def _read_answer(row: dict, name: str, prompt: list[Message] | None) -> list[Message]:
    """Returns the turns of an answer, without the prompt if they repeat it."""
    value = row[name]
    if isinstance(value, str):
        if prompt is None:
            raise BadRow(f"has a text in {name!r} and no 'prompt' that it answers")
        return [{"role": "assistant", "content": read_text(row, name)}]
    turns = read_turns([value] if isinstance(value, dict) else value, name)
    for head in (prompt, [turn for turn in prompt or [] if turn["role"] != "system"]):
        if head and _bare(turns[: len(head)]) == _bare(head):
            return turns[len(head) :]
    if prompt is not None and turns[0]["role"] != "assistant":
        raise BadRow(f"has in {name!r} another prompt than in 'prompt'; both answers must follow the same one")
    return turns


def _split(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    """Splits two conversations into their common beginning and the rest of each."""
    if _bare(chosen) == _bare(rejected):
        raise EqualPair("has chosen equal to rejected")
    shared = 0
    same = [one == other for one, other in zip(_bare(chosen), _bare(rejected), strict=False)]
    while shared < len(same) and same[shared]:
        shared += 1
    if shared == 0:
        raise BadRow("has prompts that differ: the conversations in 'chosen' and 'rejected' share no beginning")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if shared == len(turns):
            raise BadRow(f"has in {name!r} only the beginning of the other conversation, without an answer of its own")
        if turns[shared]["role"] != "assistant":
            raise BadRow(
                f"has prompts that differ: at turn {shared + 1} the conversations part, and in {name!r} that turn is "
                f"the {turns[shared]['role']}'s; both must part at an answer"
            )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _bare(turns: list[Message]) -> list[Message]:
    """Returns turns for comparison, without `train` and additional fields."""
    return [{key: value for key, value in turn.items() if key not in ("train", "extra")} for turn in turns]


def check_prompt(prompt: list[Message]) -> None:
    """Raises a `BadRow` unless the prompt ends with a turn of the user or a tool that is not blank."""
    if prompt[-1]["role"] not in ("user", "tool"):
        raise BadRow(f"has a prompt that ends with {prompt[-1]['role']}, not with what the assistant answers to")
    if not prompt[-1]["content"].strip():
        raise BadRow("has an empty prompt")


def _check_scores(row: dict) -> None:
    """Refuses a pair whose scores say that the rejected answer is the better one."""
    chosen, rejected = (row.get(f"score_{name}") for name in ("chosen", "rejected"))
    if isinstance(chosen, int | float) and isinstance(rejected, int | float) and chosen < rejected:
        raise BadRow(
            f"has a 'score_chosen' {chosen} below its 'score_rejected' {rejected}; exchange the answers, or remove the "
            "scores"
        )


def _check_answer(name: str, answer: list[Message]) -> None:
    if not answer:
        raise BadRow(f"has in {name!r} the prompt and no answer")
    if answer[0]["role"] != "assistant":
        raise BadRow(f"has in {name!r} after the prompt a turn of the {answer[0]['role']}, not of the assistant")
    if answer[-1]["role"] != "assistant":
        raise BadRow(f"has in {name!r} a conversation that does not end with the assistant")
    for message in answer:
        if message["role"] == "assistant" and is_empty_answer(message):
            raise EmptyRow(f"has an empty answer in {name!r}")
        if "train" in message:
            raise BadRow(
                f"has in {name!r} an answer of weight {weight_of(message):g}, and those of a pair are trained alike; "
                "remove the mark"
            )
