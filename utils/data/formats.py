"""The formats of rows: the fields that each is recognised by, and an example.

A new format is a row of one of the tables: `CONVERSATION_FORMATS`, `PAIR_FORMATS` or `TEXT_FORMATS`. Where the fields
are named in another way, that is all; where they are structured in another way, `convert` makes a question and an
answer, or a list of turns, of them. The messages that list the formats, and the tests, are made from the tables;
`docs/data.md` and `docs/preferences.md` show each example.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from utils.data.json_text import from_json

SYSTEM_FIELDS = ("system", "system_prompt", "system_message", "sys_prompt")
TOOL_FIELDS = ("tools", "functions")


def is_empty(value: Any) -> bool:
    """Whether a value is null, NaN (an empty cell in pandas), a blank text, an empty list or object.

    Tables have every column in each row, so a field without a value counts as one that is not there.
    """
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value or value == [] or value == {}


def holds_turns(value: Any) -> bool:
    """Whether the value of a field with a question or an answer is a turn or a list of turns, rather than a text."""
    if isinstance(value, str):
        return False
    turns = value if isinstance(value, list) else [value]
    return bool(turns) and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns)


def read_json_fields(row: dict) -> dict:
    """A row with its lists of turns and its tools parsed, where they are written as JSON text.

    Questions and answers are texts in most rows, and may be JSON as such. They are taken for turns if all of them are
    turns: those of a conversation, or both answers of a pair. A `prompt` that is a list of turns is one in any case.
    """
    if not any(isinstance(value, str) and value.lstrip()[:1] in ("[", "{", "n") for value in row.values()):
        return row  # nor is any a null
    parsed = {name: from_json(row[name]) for name in _JSON_FIELDS if isinstance(row.get(name), str)}
    parsed |= parsed_turns(row, ("chosen", "rejected")) | parsed_turns(row, ("prompt",))
    for form in CONVERSATION_FORMATS:
        if form.question:
            parsed |= parsed_turns(row, form.main)
    if isinstance(row.get("preferred_output"), str):
        parsed |= {name: from_json(row.get(name)) for name in ("input", "preferred_output", "non_preferred_output")}
    return row | parsed if parsed else row


def parsed_turns(row: dict, names: tuple[str, ...]) -> dict:
    """The turns in fields that are written as JSON text; empty unless all of the fields are."""
    if not all(isinstance(row.get(name), str) and row[name].lstrip()[:1] in ("[", "{") for name in names):
        return {}
    turns = {name: from_json(row[name]) for name in names}
    return turns if all(map(holds_turns, turns.values())) else {}


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Format:
    """A format of rows.

    Attributes:
        name: who uses it, or what it consists of.
        example: a row.
        turns: the field with the whole conversation, or with the turns before the answers of a pair.
        question: the field with the question: a text, or a list of turns.
        answers: the field with the answer, or those with the chosen and the rejected one: a text, a turn or a list of
            turns.
        texts: the fields of a pretraining row.
        also: further fields that are read, where they have a value.
        matches: a condition beyond the fields having values.
        convert: row → row with a question and an answer, or with a list of turns; those of a pair as `chosen` and
            `rejected`. It raises ValueError where that cannot be done.
    """

    name: str
    example: dict[str, Any]
    turns: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    matches: Callable[[dict], bool] = lambda row: True
    convert: Callable[[dict], dict] | None = None

    @functools.cached_property
    def main(self) -> tuple[str, ...]:
        """The fields that a row needs."""
        return tuple(filter(None, (self.turns, self.question, *self.answers, *self.texts)))

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        """All fields that are read."""
        if self.texts:
            return frozenset(self.texts)
        more = ("history", "input") if self.question else ()
        return frozenset((*self.main, *self.also, *more, *SYSTEM_FIELDS, *TOOL_FIELDS))

    def filled(self, row: dict) -> float:
        """The share of the main fields that have a value in a row."""
        return sum([not is_empty(row.get(name)) for name in self.main]) / len(self.main)

    def present(self, row: dict) -> int:
        """How many of the main fields a row has, with a value or without."""
        return sum(name in row for name in self.main)

    def is_complete(self, row: dict) -> bool:
        """Whether a row has all main fields, with a value or without."""
        return self.present(row) == len(self.main)


def find_format(row: dict, formats: tuple[Format, ...]) -> Format | None:
    """The format of a row: the first whose main fields all have a value and that matches, or else the closest one."""
    partial = []
    for form in _candidates(tuple(row), formats):
        share = form.filled(row)
        if share < 1:
            partial.append((share, form.is_complete(row), form.convert is None, form))
        elif form.matches(row):
            return form
    return max(partial, key=lambda found: found[:-1], default=(None,))[-1]


@functools.lru_cache
def _candidates(names: tuple[str, ...], formats: tuple[Format, ...]) -> list[Format]:
    """The formats of which a row with these fields has at least one."""
    return [form for form in formats if set(form.main) & set(names)]


def show_formats(formats: tuple[Format, ...]) -> str:
    """The formats for a message: `{instruction, output}, {messages}`."""
    return ", ".join(dict.fromkeys("{" + ", ".join(form.main) + "}" for form in formats))


def missing_fields(row: dict, formats: tuple[Format, ...]) -> str:
    """Describes which field a row of an incomplete format lacks: `"has no field 'output' or 'response'"`."""
    best = find_format(row, formats)
    share = best.present(row) / len(best.main)
    close = [form for form in formats if form.present(row) and form.present(row) / len(form.main) == share]
    names = dict.fromkeys(name for form in close for name in form.main if name not in row)
    return f"has no field {' or '.join(map(repr, names))}"


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _alternating(row: dict) -> dict:
    """UltraChat's list of texts, in which user and assistant take turns."""
    roles = [("user", "assistant")[number % 2] for number in range(len(row["data"]))]
    turns = [{"role": role, "content": text} for role, text in zip(roles, row["data"], strict=True)]
    return {**row, "data": turns}


_EXCHANGE = {"user": "human", "assistant": "assistant"}  # role → its field in Firefly's turns


def _are_exchanges(value: Any) -> bool:
    dicts = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    return dicts and all(set(_EXCHANGE.values()) <= turn.keys() for turn in value)


def _from_exchanges(row: dict) -> dict:
    """Firefly's list of objects with a question and its answer each."""
    turns = []
    for exchange in row["conversation"]:
        turns += [{"role": role, "content": exchange[key]} for role, key in _EXCHANGE.items()]
        if more := [name for name in exchange if name not in _EXCHANGE.values() and not is_empty(exchange[name])]:
            raise ValueError(f"has {more[0]!r} in a turn of 'conversation', which is not read; remove it")
    return {**row, "conversation": turns}


# in the order of preference, for a row that has the fields of several
CONVERSATION_FORMATS = (
    Format(
        "OpenAI, Hugging Face",
        {"messages": [{"role": "user", "content": "What is 7 + 8?"}, {"role": "assistant", "content": "15"}]},
        turns="messages",
    ),
    Format(
        "messages, in the singular",
        {"message": [{"role": "user", "content": "What is 7 + 8?"}, {"role": "assistant", "content": "15"}]},
        turns="message",
        matches=lambda row: isinstance(row["message"], list),  # elsewhere it is a text, such as a commit's
    ),
    Format(
        "ShareGPT",
        {"conversations": [{"from": "human", "value": "What is 7 + 8?"}, {"from": "gpt", "value": "15"}]},
        turns="conversations",
    ),
    Format(
        "Firefly, several turns",
        {"conversation": [{"human": "What is 7 + 8?", "assistant": "15"}]},
        turns="conversation",
        matches=lambda row: _are_exchanges(row["conversation"]),
        convert=_from_exchanges,
    ),
    Format(
        "ShareGPT, in the singular",
        {"conversation": [{"from": "human", "value": "What is 7 + 8?"}, {"from": "gpt", "value": "15"}]},
        turns="conversation",
    ),
    Format(
        "UltraChat",
        {"data": ["What is 7 + 8?", "15"]},
        turns="data",
        matches=lambda row: _are_texts(row["data"]),
        convert=_alternating,
    ),
    Format(
        "Alpaca",
        {"instruction": "Add the numbers.", "input": "7, 8", "output": "15"},
        question="instruction",
        answers=("output",),
        also=("context",),
    ),
    Format(
        "Dolly",
        {"instruction": "Add the numbers.", "context": "7, 8", "response": "15"},
        question="instruction",
        answers=("response",),
        also=("context",),
    ),
    Format(
        "TRL",
        {"prompt": "What is 7 + 8?", "completion": "15"},
        question="prompt",
        answers=("completion",),
    ),
    Format(
        "prompt and response",
        {"prompt": "What is 7 + 8?", "response": "15"},
        question="prompt",
        answers=("response",),
    ),
    Format(
        "ms-swift",
        {"query": "What is 7 + 8?", "response": "15"},
        question="query",
        answers=("response",),
    ),
    Format(
        "question and answer",
        {"question": "What is 7 + 8?", "answer": "15"},
        question="question",
        answers=("answer",),
    ),
    Format(
        "OpenOrca",
        {"system_prompt": "Be brief.", "question": "What is 7 + 8?", "response": "15"},
        question="question",
        answers=("response",),
    ),
    Format(
        "Firefly",
        {"input": "What is 7 + 8?", "target": "15"},
        question="input",
        answers=("target",),
    ),
    Format(
        "input and output",
        {"input": "What is 7 + 8?", "output": "15"},
        question="input",
        answers=("output",),
    ),
)  # fmt: skip

TEXT_FORMATS = (
    Format("text", {"text": "Pears ripen in autumn."}, texts=("text",)),
    Format(
        "content",
        {"content": "Pears ripen in autumn."},
        texts=("content",),
        matches=lambda row: "role" not in row,  # a single turn
    ),
)


TURN_FIELDS = tuple(dict.fromkeys(form.turns for form in CONVERSATION_FORMATS if form.turns))
_JSON_FIELDS = (*TURN_FIELDS, *TOOL_FIELDS, "history")

# ------------------------------------------------------------------ preference pairs
_SPEAKER = re.compile(r"\s*\n\n(Human|Assistant):[ ]?|\A(Human|Assistant):[ ]?")


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and _SPEAKER.match(value) is not None


def _dialogue_turns(text: str) -> list[dict]:
    """`"\\n\\nHuman: Hi\\n\\nAssistant: Hello"` → its turns."""
    _, *parts = _SPEAKER.split(text)  # what each of the two groups matched, then the text after it
    speakers = [at_break or at_start for at_break, at_start in zip(parts[::3], parts[1::3], strict=True)]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[speaker], "content": said} for speaker, said in zip(speakers, parts[2::3], strict=True)]


def _from_dialogues(row: dict) -> dict:
    """HH-RLHF's dialogues; a field `prompt` beside them repeats their beginning."""
    rest = {name: value for name, value in row.items() if name != "prompt"}
    return rest | {name: _dialogue_turns(row[name]) for name in _BOTH}


def _from_preferred_output(row: dict) -> dict:
    inner = dict(row["input"])
    if unknown := set(inner) - {"messages", "tools", "parallel_tool_calls"}:
        raise ValueError(f"has {sorted(unknown)[0]!r} in 'input', which is not read; remove it")
    inner.pop("parallel_tool_calls", None)
    rest = {name: value for name, value in row.items() if name != "input"}
    inner = {name: value for name, value in inner.items() if not is_empty(value)}
    if twice := [name for name in inner if not is_empty(rest.get(name)) and rest[name] != inner[name]]:
        raise ValueError(f"has {twice[0]!r} in 'input' and beside it, and they differ; keep one of them")
    return rest | inner | {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}


def _from_prompt_apart(row: dict) -> dict:
    """The dialogue up to the answers is in `prompt`, which ends by opening an answer."""
    *turns, opening = _dialogue_turns(row["prompt"])
    answers = {name: row[name].removeprefix(" ") for name in _BOTH}
    return {**row, "prompt": turns if is_empty(opening["content"]) else [*turns, opening], **answers}


def _opens_answer(row: dict) -> bool:
    return (
        _is_dialogue(row["prompt"])
        and row["prompt"].rstrip().endswith("\n\nAssistant:")
        and _are_texts([row["chosen"], row["rejected"]])
    )


def _from_rejected_response(row: dict) -> dict:
    *turns, answer = row["messages"]
    return {**row, "messages": turns, "chosen": answer, "rejected": row["rejected_response"]}


def _from_two_outputs(row: dict) -> dict:
    chosen, rejected = row["output"]
    return {name: value for name, value in row.items() if name != "output"} | {"chosen": chosen, "rejected": rejected}


_BOTH = ("chosen", "rejected")
_TURNS = [{"role": "user", "content": "What is 7 + 8?"}]
_RIGHT, _WRONG = ([{"role": "assistant", "content": text}] for text in ("15", "16"))

PAIR_FORMATS = (
    Format(
        "HH-RLHF",
        {
            "chosen": "\n\nHuman: What is 7 + 8?\n\nAssistant: 15",
            "rejected": "\n\nHuman: What is 7 + 8?\n\nAssistant: 16",
        },
        answers=_BOTH,
        matches=lambda row: _is_dialogue(row["chosen"]) and _is_dialogue(row["rejected"]),
        convert=_from_dialogues,
    ),
    Format(
        "HH-RLHF, prompt apart",
        {"prompt": "\n\nHuman: What is 7 + 8?\n\nAssistant:", "chosen": " 15", "rejected": " 16"},
        question="prompt",
        answers=_BOTH,
        matches=_opens_answer,
        convert=_from_prompt_apart,
    ),
    Format(
        "TRL",
        {"prompt": "What is 7 + 8?", "chosen": "15", "rejected": "16"},
        question="prompt",
        answers=_BOTH,
    ),
    Format(
        "Alpaca with two answers",
        {"instruction": "Add the numbers.", "input": "7, 8", "chosen": "15", "rejected": "16"},
        question="instruction",
        answers=_BOTH,
        also=("context",),
    ),
    Format(
        "Orca",
        {"system": "Be brief.", "question": "What is 7 + 8?", "chosen": "15", "rejected": "16"},
        question="question",
        answers=_BOTH,
    ),
    Format(
        "messages with two answers",
        {"messages": _TURNS, "chosen": _RIGHT, "rejected": _WRONG},
        turns="messages",
        answers=_BOTH,
    ),
    Format(
        "ShareGPT with two answers",
        {
            "conversations": [{"from": "human", "value": "What is 7 + 8?"}],
            "chosen": {"from": "gpt", "value": "15"},
            "rejected": {"from": "gpt", "value": "16"},
        },
        turns="conversations",
        answers=_BOTH,
    ),
    Format(
        "OpenAI",
        {"input": {"messages": _TURNS}, "preferred_output": _RIGHT, "non_preferred_output": _WRONG},
        turns="input",
        answers=("preferred_output", "non_preferred_output"),
        matches=lambda row: isinstance(row["input"], dict),
        convert=_from_preferred_output,
    ),
    Format(
        "ms-swift",
        {"messages": _TURNS + _RIGHT, "rejected_response": "16"},
        turns="messages",
        answers=("rejected_response",),
        matches=lambda row: isinstance(row["messages"], list) and len(row["messages"]) > 1,
        convert=_from_rejected_response,
    ),
    Format(
        "UltraFeedback: two conversations that begin alike",
        {"chosen": _TURNS + _RIGHT, "rejected": _TURNS + _WRONG},
        answers=_BOTH,
    ),
    Format(
        "instruction with a list of a good and a bad answer",
        {"instruction": "What is 7 + 8?", "output": ["15", "16"]},
        question="instruction",
        answers=("output",),
        also=("context",),
        matches=lambda row: isinstance(row["output"], list) and len(row["output"]) == 2,
        convert=_from_two_outputs,
    ),
)  # fmt: skip
