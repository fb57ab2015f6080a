"""The row types there are: conversation, plain text and preference pair."""

import json
from collections.abc import Callable, Collection

from utils.data.conversations import to_messages, to_text
from utils.data.formats import CONVERSATION_FORMATS, PAIR_FORMATS, TEXT_FORMATS, Format, find_format
from utils.data.pairs import repeats_answer, to_pair
from utils.data.row_type import IDS, LABELS, WEIGHTS, RowType, SequenceColumns, Texts
from utils.data.token_rows import TOKEN_FIELDS, TokenRow, is_token_row, with_token_rows
from utils.data.truncate import count_tokens
from utils.template.messages import REASONING_FIELDS
from utils.template.tokenize import IGNORE_INDEX


def _fields_read(row: dict, formats: tuple[Format, ...]) -> Collection[str]:
    if is_token_row(row) and formats is not PAIR_FORMATS:
        return TOKEN_FIELDS
    form = find_format(row, formats)
    return form.reads if form else ()


def _known_fields(formats: tuple[Format, ...]) -> frozenset[str]:
    return frozenset().union(*(form.reads for form in formats))


# ------------------------------------------------------------------ conversation and text
_ONE_SEQUENCE = (SequenceColumns("", ("input_ids",), "labels"),)
_ONE_SEQUENCE_COLUMNS = {"input_ids": IDS, "labels": LABELS}


def _message_text(message: dict) -> str:
    more = [message[key] for key in REASONING_FIELDS if message.get(key)]
    more += [json.dumps(message[key], ensure_ascii=False) for key in ("tool_calls", "tools") if message.get(key)]
    return "\n".join([message["content"], *more])


def _conversation_texts(messages: list[dict]) -> Texts:
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return Texts([_message_text(m) for m in messages[:last]], [_message_text(m) for m in messages[last:]])


def _token_texts(row: TokenRow) -> Texts:
    return Texts([], [" ".join(map(str, row.input_ids))])  # to find rows that repeat others


def _token_counts(row: TokenRow, template, tokenizer) -> tuple[int, int]:
    return len(row.input_ids), 0


def _of_either(of_text: Callable, of_tokens: Callable) -> Callable:
    """A function of what `with_token_rows` returns, and further arguments."""
    return lambda row, *more: (of_tokens if isinstance(row, TokenRow) else of_text)(row, *more)


def _one_token_without_label(first: dict) -> dict:
    empty = {"input_ids": [0], "labels": [IGNORE_INDEX], "loss_weights": None, "source": [], "seq_lengths": [1]}
    return {name: empty[name] for name in first}


CONVERSATION = RowType(
    "conversation",
    read=with_token_rows(to_messages),
    texts=_of_either(_conversation_texts, _token_texts),
    fields_read=lambda row: _fields_read(row, CONVERSATION_FORMATS),
    known_fields=_known_fields(CONVERSATION_FORMATS) | set(TOKEN_FIELDS),
    columns={**_ONE_SEQUENCE_COLUMNS, "loss_weights": WEIGHTS},
    sequence_columns=_ONE_SEQUENCE,
    token_counts=_of_either(
        lambda messages, template, tokenizer: (count_tokens(template.render(messages), tokenizer), 0), _token_counts
    ),
    filler=_one_token_without_label,
)
PLAIN_TEXT = RowType(
    "text",
    read=with_token_rows(to_text),
    texts=_of_either(lambda text: Texts([], [text]), _token_texts),
    fields_read=lambda row: _fields_read(row, TEXT_FORMATS),
    known_fields=_known_fields(TEXT_FORMATS) | set(TOKEN_FIELDS),
    columns=_ONE_SEQUENCE_COLUMNS,
    sequence_columns=_ONE_SEQUENCE,
    # the eos token ends each
    token_counts=_of_either(
        lambda text, template, tokenizer: (len(tokenizer(text)["input_ids"]) + 1, 0), _token_counts
    ),
    filler=_one_token_without_label,
)

# ------------------------------------------------------------------ preference pair
_SIDES = ("chosen", "rejected")


def _pair_texts(pair: dict) -> Texts:
    answers = ["\n".join(map(_message_text, pair[side])) for side in _SIDES]
    return Texts([_message_text(message) for message in pair["prompt"]], answers)


def _pair_token_counts(pair: dict, template, tokenizer) -> tuple[int, int]:
    turns = (pair["prompt"], *(pair["prompt"] + pair[side] for side in _SIDES))
    prompt, *sides = (count_tokens(template.render(messages), tokenizer) for messages in turns)
    return max(sides), prompt


PAIR = RowType(
    "preference pair",
    read=to_pair,
    texts=_pair_texts,
    fields_read=lambda row: (
        *_fields_read(row, PAIR_FORMATS), "reject", *(["messages"] if repeats_answer(row) else [])
    ),
    known_fields=_known_fields(PAIR_FORMATS) | {"reject"},
    columns={
        "prompt_ids": IDS, "chosen_ids": IDS, "chosen_labels": LABELS, "rejected_ids": IDS, "rejected_labels": LABELS,
    },
    sequence_columns=tuple(SequenceColumns(side, ("prompt_ids", f"{side}_ids"), f"{side}_labels") for side in _SIDES),
    token_counts=_pair_token_counts,
    compares_answers=True,
    has_prompt_limit=True,
)  # fmt: skip
