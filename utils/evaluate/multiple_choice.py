"""Multiple choice by log-likelihood: reads questions with choices, encodes them, and computes the likelihoods."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from utils.data.bad_rows import BadRow, unreadable
from utils.data.conversations import Message, read_question
from utils.data.fields import prompt_problem
from utils.data.files import RawRow
from utils.data.formats import TOOL_FIELDS, is_empty
from utils.data.turns import kind_name, read_text
from utils.runtime.errors import UserError
from utils.template.tokenize import (
    IGNORE_INDEX,
    Segment,
    encode_segments,
    escape_messages,
    escape_patterns,
    escape_special_tokens,
    pick_escape_char,
)

CHOICE_FORMAT = '{"question": …, "choices": [two texts or more], "answer": its index from 0, its letter or its text}'
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Choices:
    """A question with its choices.

    Attributes:
        file: the file it was read from.
        line: the line in it, or the number of the row in a table.
        messages: the conversation up to the answer; the last turn is the question.
        letters: the letter of each choice, or its key.
        texts: the choices.
        answer: the index of the right one.
    """

    file: str
    line: int
    messages: list[Message]
    letters: list[str]
    texts: list[str]
    answer: int


class Scored(NamedTuple):
    """A prompt followed by a choice.

    Attributes:
        ids: token ids, [L]; the choice's tokens are the last ones.
        first: the index of the choice's first token.
    """

    ids: list[int]
    first: int


def read_choices(raw: RawRow) -> Choices:
    """Reads one row.

    `{"question": "1 + 1?", "choices": ["1", "2"], "answer": "B"}` → answer 1. `choices` may also be an object
    `{"A": …, "B": …}`, and in a CSV file it is JSON. `system` and `history` are read as in training rows.

    Raises:
        BadRow: a field is missing or of another type, or the right choice is ambiguous.
    """
    row = raw.value
    if raw.problem:
        raise unreadable(raw)
    if not isinstance(row, dict):
        raise BadRow(f"is {kind_name(row)}, not an object with fields")
    missing = [name for name in ("question", "choices", "answer") if row.get(name) is None]
    if missing:
        raise BadRow(f"has no field {missing[0]!r}; expected {CHOICE_FORMAT}")
    if problem := prompt_problem(row):
        raise BadRow(problem)
    if name := next((name for name in TOOL_FIELDS if not is_empty(row.get(name))), None):
        raise BadRow(f"has a field {name!r}, and questions with choices are asked without tools; remove it")
    messages = read_question(row, "question")
    letters, texts = _read_texts(row["choices"])
    answer = _find(row["answer"], letters, texts, by_index=not isinstance(_parsed(row["choices"]), dict))
    return Choices(raw.file, raw.line, messages, letters, texts, answer)


def _parsed(choices: Any) -> Any:
    if isinstance(choices, str) and choices.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(choices)
        except ValueError:
            pass
    return choices


def _read_texts(choices: Any) -> tuple[list[str], list[str]]:
    choices = _parsed(choices)
    if isinstance(choices, list):
        choices = dict(zip(LETTERS, choices, strict=False)) if len(choices) <= len(LETTERS) else {}
        if not choices:
            raise BadRow(f"has an empty list in 'choices', or one of more than {len(LETTERS)}")
    if not isinstance(choices, dict):
        raise BadRow(f"has {kind_name(choices)} in 'choices', not a list of texts or an object of them")
    # tables have every column in every row
    choices = {name: choices[name] for name in choices if choices[name] is not None}
    if len(choices) < 2:
        raise BadRow(f"has {len(choices)} in 'choices'; give at least two")
    texts = []
    for name in choices:
        text = read_text(choices, name).strip()
        if not text:
            raise BadRow(f"has an empty text as choice {name}")
        if text in texts:
            raise BadRow(f"has the choice {text!r} twice")
        texts.append(text)
    return list(choices), texts


def _find(answer: Any, letters: list[str], texts: list[str], by_index: bool) -> int:
    """The index of the right choice. The answer may be an index, a letter or a text; all readings of it must agree."""
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        raise BadRow(f"has {kind_name(answer)} in 'answer' ({answer!r}), not an index, a letter or a text")
    given = str(answer).strip()
    readings = {}
    if given in letters or (len(given) == 1 and given.upper() in letters):
        readings["letter"] = letters.index(given if given in letters else given.upper())
    if isinstance(answer, str) and given in texts:
        readings["text"] = texts.index(given)
    if by_index and given.isdecimal() and int(given) < len(texts):
        readings["index from 0"] = int(given)
    places = sorted(set(readings.values()))
    if not places:
        raise BadRow(
            f"has the answer {answer!r}; allowed are "
            + (f"an index from 0 to {len(texts) - 1}, " if by_index else "")
            + f"one of {', '.join(letters)}, or the text of a choice"
        )
    if len(places) > 1:
        names = " and ".join(f"the {reading} of {letters[place]}" for reading, place in readings.items())
        raise BadRow(f"has the answer {answer!r}, which is {names}; give a letter that is not the text of a choice")
    return places[0]


def encode_choices(row: Choices, tokenizer, form: str = "text") -> list[Scored]:
    """Encodes each choice as the answer to the question, prompt and choice in one tokenisation.

    A choice's tokens are those after the prompt for generation, up to the end of the choice.

    Args:
        row: the question.
        tokenizer: a fast one, with the model's chat template.
        form: `text`: the prompt is the question, the answer a choice's text, as in ARC and HellaSwag. `letter`: the
            prompt also lists the choices with their letters, and the answer is a letter, as in MMLU.

    Raises:
        UserError: the chat format refuses the conversation, or does not render a choice unchanged.
    """
    messages, answers = row.messages, row.texts
    if form == "letter":
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip(row.letters, row.texts, strict=True))
        messages = [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}\n{listed}"}]
        answers = row.letters
    # a special token's text within a row stays plain text, as in training
    mark = pick_escape_char(json.dumps([messages, answers], ensure_ascii=False))
    pieces = [_segments(tokenizer, messages, answer, mark) for answer in answers]
    scored = []
    for encoded in encode_segments(pieces, tokenizer, allow_special=True, escape_chars=[mark] * len(pieces)):
        labelled = [place for place, label in enumerate(encoded["labels"]) if label != IGNORE_INDEX]
        if not labelled or not labelled[0]:
            raise UserError("the model's tokenizer makes no token of a choice, or none of the prompt before it")
        scored.append(Scored(encoded["input_ids"][: labelled[-1] + 1], labelled[0]))
    return scored


def _segments(tokenizer, messages: list[Message], answer: str, mark: str) -> list[Segment]:
    """The rendered conversation; its trained segment is the answer without the stop token."""
    from jinja2 import TemplateError

    breaks = escape_patterns(tokenizer, tokenizer.get_chat_template())
    messages, answer = escape_messages(messages, breaks, mark), escape_special_tokens(answer, breaks.answers, mark)
    turns = [*messages, {"role": "assistant", "content": answer}]
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the model's chat format refuses the conversation: {error}") from error
    found = text.find(answer, len(prompt)) if text.startswith(prompt) else -1
    if found < 0:
        raise UserError(f"the model's chat format does not render the choice {answer!r} after its prompt")
    # a space that the format puts before an answer is the model's to predict; an empty thought is not
    start = found if text[len(prompt) : found].strip() else len(prompt)
    end = found + len(answer)
    return [Segment(text[:start]), Segment(text[start:end], trained=True), Segment(text[end:])]


def log_likelihoods(model, scored: list[Scored], batch_size: int, pad_id: int) -> Iterator[tuple[int, float]]:
    """The log-likelihoods of choices given their prompts, without a stop token after them.

        log p(choice | prompt) = Σ_t log softmax(logits_{t-1})[token_t],  t over the choice's tokens

    This is `loglikelihood` of EleutherAI's evaluation harness. Divided by the choice's bytes in UTF-8, it is what the
    harness calls byte-length normalised (its `acc_norm` divides by characters): it does not favour short choices, and
    does not depend on the tokenizer.

    Args:
        model: in evaluation mode.
        scored: from `encode_choices`.
        batch_size: the largest number computed at once. Batches are of similar length, the longest first, padded on
            the right.
        pad_id: the id of the padding.

    Yields:
        (index in `scored`, natural logarithm of the likelihood), batch by batch.

    Raises:
        UserError: a batch does not fit the device's memory, or a likelihood is not finite.
    """
    import torch

    order = sorted(range(len(scored)), key=lambda place: -len(scored[place].ids))
    for at in range(0, len(order), batch_size):
        places = order[at : at + batch_size]
        try:
            sums = _of_batch(model, [scored[place] for place in places], pad_id)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(places):,} choices of up to {len(scored[places[0]].ids):,} tokens with their prompts do not fit "
                "the GPU's memory; give a smaller --batch_size"
            ) from error
        if not torch.isfinite(sums).all():
            raise UserError("the model computes likelihoods that are not finite; its weights may be damaged")
        yield from zip(places, sums.tolist(), strict=True)


def _of_batch(model, batch: list[Scored], pad_id: int):
    """The log-likelihood of each choice, [rows], in float64 on the CPU."""
    import inspect

    import torch

    width, first = max(len(row.ids) for row in batch), min(row.first for row in batch)
    ids = torch.full((len(batch), width), pad_id)
    seen, counted = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.bool)
    for place, row in enumerate(batch):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        seen[place, : len(row.ids)] = 1
        counted[place, row.first : len(row.ids)] = True
    options = {"input_ids": ids.to(model.device), "attention_mask": seen.to(model.device), "use_cache": False}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        options["logits_to_keep"] = width - first + 1  # logits of the prompts would need much memory
    with torch.inference_mode():
        # [rows, width - first, vocabulary]: the logits before each token from `first` on
        logits = model(**options).logits[:, first - width - 1 : -1].float()
        picked = logits.gather(-1, options["input_ids"][:, first:, None]).squeeze(-1) - logits.logsumexp(-1)
        return picked.masked_fill(~counted[:, first:].to(picked.device), 0).double().sum(-1).cpu()
