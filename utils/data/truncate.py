"""Truncates conversations and preference pairs to `max_len`: the oldest turns first, never an answer."""

import math
from collections.abc import Callable

from utils.data.bad_rows import EqualPair
from utils.data.pairs import Pair
from utils.data.report import TOO_LONG, Dropped
from utils.runtime.errors import UserError
from utils.template import Message, Template
from utils.template.messages import UNTRAINED_ANSWER, RowNote, count_answers, is_trained_answer, select_answers
from utils.template.tokenize import IGNORE_INDEX, encode_texts

_SIDES = ("chosen", "rejected")
# why an answer is not trained, beside the reasons of a template; each completes "line N …"
MARKED = "has an answer marked as not to be trained, or within its 'prompt'"
CUT_OFF = "has an answer among the oldest turns, which are cut off"
_SLACK = 16  # tokens by which the estimate of a pair's length may exceed its encoded length


def encode_within(
    conversations: list[list[Message]], template: Template, tokenizer, max_len: int, truncate: bool = True, **options
) -> list[dict | Dropped]:
    """Encodes conversations so that none is longer than `max_len`.

    Args:
        conversations: lists of messages that the template supports; those from `cut_far` count as shortened.
        template: renders them.
        tokenizer: a fast one.
        max_len: tokens.
        truncate: whether a longer one is truncated rather than dropped.
        **options: further arguments of `Template.encode_batch`.

    Returns:
        for each `{"input_ids", "labels", "shortened", "notes", "answers"}`, or why it is dropped; `answers` is the
        number of the conversation's answers, and of those that `train_on` leaves out.
    """
    train_on = options.get("train_on", "all_turns")

    def shorten(messages: list[Message], encoded: dict) -> dict | Dropped:
        shortened = isinstance(messages, Shortened)
        whole = messages.whole if shortened else messages
        while (surplus := len(encoded["input_ids"]) - max_len) > 0:
            if not truncate:
                return Dropped(f"is too long for --max_len {max_len}", TOO_LONG)
            longer, messages = messages, shorter(messages, surplus, tokenizer)
            if messages is None:
                return Dropped(f"is too long for --max_len {max_len} with its answer, which is never cut", TOO_LONG)
            if not can_move_system(template, longer, messages):
                return Dropped(f"is too long for --max_len {max_len} and {SYSTEM_STAYS}", TOO_LONG)
            encoded, shortened = template.encode(messages, tokenizer, **options), True
        if encoded["labels"].count(IGNORE_INDEX) == len(encoded["labels"]):
            return Dropped("has nothing to train")
        notes, answers = _fates(template, whole, messages, train_on)
        return {**encoded, "shortened": shortened, "notes": notes, "answers": answers}

    encoded = template.encode_batch(conversations, tokenizer, **options)
    return [shorten(messages, row) for messages, row in zip(conversations, encoded, strict=True)]


# a conversation is truncated in advance if it has more questions than this, or more characters for each token allowed
_MANY_QUESTIONS = 32
_CHARACTERS_PER_TOKEN = 4


def _fates(
    template: Template, whole: list[Message], messages: list[Message], train_on: str
) -> tuple[list[RowNote], tuple[int, int]]:
    """What becomes of the answers of a conversation.

    Args:
        template: renders it.
        whole: all of its messages.
        messages: those that are trained, without the oldest turns if it is too long.
        train_on: `--train_on`.

    Returns:
        notes of the answers that are not trained and of fields that are not read; the number of all answers, and of
        those that `train_on` leaves out.
    """
    answers, unmarked = count_answers(whole), sum(map(is_trained_answer, whole))
    selected, kept = (sum(map(is_trained_answer, select_answers(part, train_on))) for part in (whole, messages))
    notes = [RowNote(UNTRAINED_ANSWER, MARKED)] * (answers - unmarked)
    notes += [RowNote(UNTRAINED_ANSWER, CUT_OFF)] * (selected - kept)
    return [*template.notes(messages, train_on), *notes], (answers, unmarked - selected)


class Shortened(list):
    """The messages of a conversation without its oldest turns.

    Attributes:
        whole: all of its messages.
    """

    whole: list[Message] = []


def cut_far(messages: list[Message], template: Template, tokenizer, max_len: int) -> list[Message]:
    """Drops the oldest turns of a conversation that is far too long, before it is encoded.

    Dropping them one by one, each time with a new rendering and tokenisation, would take time at least quadratic in
    the number of turns. No turn is dropped that `encode_within` would keep.

    Args:
        messages: ending with an answer.
        template: renders them.
        tokenizer: a fast one.
        max_len: tokens.

    Returns:
        the messages themselves, or `Shortened`.
    """
    if not is_far(messages, max_len):
        return messages
    # without escaping: a special token's text in a content makes the encoding longer than this count
    return first_fit(messages, lambda rest: count_tokens(template.render(rest), tokenizer) - max_len)


def is_far(messages: list[Message], max_len: int) -> bool:
    """Whether a conversation may be so long that it is worth one more rendering to truncate it in advance."""
    questions = sum(message["role"] == "user" for message in messages)
    # tools, calls and reasoning as Python writes them, which is about as long as a template does
    characters = sum(len(str(value)) for message in messages for key, value in message.items() if key != "role")
    return questions > _MANY_QUESTIONS or (questions > 1 and characters > _CHARACTERS_PER_TOKEN * max_len)


def check_all(template: Template, kept: list[Message], messages: list[Message]) -> None:
    """Raises a `UserError` if the template does not support a truncated conversation.

    The error numbers the turns as in the whole conversation if that is not supported either.
    """
    try:
        template.check(kept)
    except UserError:
        template.check(messages)
        raise


def first_fit(messages: list[Message], surplus: Callable[[list[Message]], int]) -> list[Message]:
    """Drops as few of the oldest turns as make a conversation fit, or all that may be dropped.

    The start is searched by interpolation: turns are of similar lengths, so three or four renderings mostly suffice.

    Args:
        messages: ending with an answer.
        surplus: messages → the number of tokens above the limit; must be monotonic in their number.

    Returns:
        the messages themselves, or `Shortened`.
    """
    starts = _starts(messages)
    try:
        if not starts or (longest := surplus(messages)) <= 0:
            return messages
        # what begins at starts[low] is too long by `longest` tokens; what begins at starts[high] by `shortest`, if any
        low, high = -1, len(starts) - 1
        shortest = surplus(_from(messages, starts[high]))
        step = 0
        while high - low > 1 and shortest <= 0:
            step += 1
            share = longest / (longest - shortest) if step % 3 else 0.5
            middle = min(max(low + math.ceil((high - low) * share), low + 1), high - 1)
            tokens = surplus(_from(messages, starts[middle]))
            if tokens > 0:
                low, longest = middle, tokens
            else:
                high, shortest = middle, tokens
    except UserError:
        return messages  # the template's check names the turn it does not support
    kept = Shortened(_from(messages, starts[high]))
    kept.whole = messages
    return kept


def count_tokens(text: str, tokenizer) -> int:
    """Counts the tokens of a text, special tokens in it included."""
    return len(encode_texts([text], tokenizer)[0].ids)


def shorter(messages: list[Message], surplus: int, tokenizer) -> list[Message] | None:
    """Drops the oldest turn, or else truncates the only question; returns None if neither is possible.

    Args:
        messages: ending with an answer.
        surplus: the number of tokens above the limit.
        tokenizer: a fast one.
    """
    return _without_oldest_turn(messages) or _with_shorter_question(messages, surplus, tokenizer)


SYSTEM_STAYS = "has a system message among the turns to drop, which the template supports nowhere else"


def can_move_system(template: Template, messages: list[Message], kept: list[Message]) -> bool:
    """Whether a template supports a truncated conversation whose later system messages have moved to its start."""
    if _count_head(kept) == _count_head(messages):
        return True
    try:
        template.check(kept)
    except UserError:
        return False
    return True


def _count_head(messages: list[Message]) -> int:
    """Counts the system messages at the beginning."""
    return next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))


def _split_head(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    count = _count_head(messages)
    return messages[:count], messages[count:]


def _without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """Drops the turns before the second question except system messages; None if there is no second question."""
    starts = _starts(messages)
    return _from(messages, starts[0]) if starts else None


def _starts(messages: list[Message]) -> list[int]:
    """Returns the questions that a truncated conversation may begin with: all but the first that an answer follows."""
    turns = _split_head(messages)[1]
    last = max((i for i, message in enumerate(turns) if message["role"] == "assistant"), default=0)
    return [i for i, message in enumerate(turns[:last]) if message["role"] == "user" and i > 0]


def _from(messages: list[Message], start: int) -> list[Message]:
    """Returns the turns from `start` on, after all system messages before them."""
    head, turns = _split_head(messages)
    later = [message for message in turns[:start] if message["role"] == "system"]
    return _keep_tools([*head, *later, *turns[start:]], messages)


def _keep_tools(shorter: list[Message], messages: list[Message]) -> list[Message]:
    """Moves the tools of a conversation to its new first message."""
    if "tools" not in messages[0] or "tools" in shorter[0]:
        return shorter
    return [{**shorter[0], "tools": messages[0]["tools"]}, *shorter[1:]]


def _with_shorter_question(messages: list[Message], surplus: int, tokenizer) -> list[Message] | None:
    """Removes `surplus` tokens from the start of the only question; None if nothing would be left of it."""
    head, turns = _split_head(messages)
    if turns[0]["role"] != "user":
        return None
    question = turns[0]["content"]
    offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) <= surplus:
        return None
    cut = question[max(1, offsets[surplus][0]) :]
    return [*head, {**turns[0], "content": cut}, *turns[1:]] if cut.strip() else None


def encode_pairs_within(
    pairs: list[Pair],
    template: Template,
    tokenizer,
    max_len: int,
    max_prompt_length: int,
    truncate: bool = True,
    allow_special: bool = False,
) -> list[dict | Dropped]:
    """Encodes pairs so that neither a prompt nor a prompt with its answer is too long.

    Args:
        pairs: from `to_pair`, supported by the template; prompts from `cut_pair_far` count as shortened.
        template: renders them, exactly as for SFT.
        tokenizer: a fast one.
        max_len: tokens of the prompt and the longer answer.
        max_prompt_length: tokens of the prompt, including the opening of the answer.
        truncate: whether a longer prompt is truncated rather than the pair dropped.
        allow_special: as in `Template.encode`.

    Returns:
        for each the columns of a preference pair (`row_types.PAIR`) and `shortened`, or why the pair cannot be trained.
    """

    def surplus(row: dict) -> int:
        answer = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        return max(len(row["prompt_ids"]) - max_prompt_length, len(row["prompt_ids"]) + answer - max_len)

    def fit(pair: Pair, row: dict | Dropped) -> dict | Dropped:
        shortened = isinstance(pair["prompt"], Shortened)
        limits = f"--max_len {max_len} and --max_prompt_length {max_prompt_length}"
        while not isinstance(row, Dropped) and (too_many := surplus(row)) > 0:
            if not truncate:
                return Dropped(f"is too long for {limits}", TOO_LONG)
            longer = [*pair["prompt"], pair["chosen"][0]]
            kept = shorter(longer, too_many, tokenizer)
            if kept is None:
                return Dropped(f"is too long for {limits} with its answers, which are never cut", TOO_LONG)
            if not can_move_system(template, longer, kept):
                return Dropped(f"is too long for {limits} and {SYSTEM_STAYS}", TOO_LONG)
            pair, shortened = {**pair, "prompt": kept[:-1]}, True
            row = _encode([pair], template, tokenizer, allow_special)[0]
        if isinstance(row, Dropped):
            return row
        # all answers of a pair are trained, so its notes are about fields only
        notes = template.notes(pair["prompt"] + pair["chosen"], train_on=count_answers(pair["chosen"]))
        return {**row, "shortened": shortened, "notes": notes}

    return [fit(*both) for both in zip(pairs, _encode(pairs, template, tokenizer, allow_special), strict=True)]


def cut_pair_far(pair: Pair, template: Template, tokenizer, max_len: int, max_prompt_length: int) -> Pair:
    """As `cut_far`, for the prompt of a pair; drops no turn that `encode_pairs_within` would keep."""
    if not is_far(pair["prompt"], min(max_len, max_prompt_length)):
        return pair

    def surplus(asked: list) -> int:
        counts = []
        for side in _SIDES:
            tokens = count_tokens(template.render([*asked[:-1], *pair[side]]), tokenizer) - _SLACK
            counts.append(tokens - max_len)
            if len(pair[side]) == 1:
                counts.append(tokens - count_tokens(pair[side][0]["content"], tokenizer) - max_prompt_length)
        return max(counts)

    asked = first_fit([*pair["prompt"], pair["chosen"][0]], surplus)
    return {**pair, "prompt": Shortened(asked[:-1])} if isinstance(asked, Shortened) else pair


def _encode(pairs: list[Pair], template: Template, tokenizer, allow_special: bool) -> list[dict | Dropped]:
    """Tokenises prompt and answer of each side together and labels only the answer."""
    sides = [(pair["prompt"] + pair[side], count_answers(pair[side])) for pair in pairs for side in _SIDES]
    encoded: list[dict] = [{}] * len(sides)
    for answers in {count for _, count in sides}:
        places = [place for place, (_, count) in enumerate(sides) if count == answers]
        conversations = [sides[place][0] for place in places]
        rows = template.encode_batch(conversations, tokenizer, allow_special, train_on=answers)
        for place, row in zip(places, rows, strict=True):
            encoded[place] = row
    return [_joined(*both) for both in zip(encoded[::2], encoded[1::2], strict=True)]


def _joined(chosen: dict, rejected: dict) -> dict | Dropped:
    """Splits two encoded conversations into the ids they share and the rest of each, up to its last label.

    Tokens after the last stop token, such as a line feed, are dropped, since no trained token attends to them.
    """
    trained = [[i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX] for row in (chosen, rejected)]
    if not all(trained):
        return Dropped("has nothing to train")
    start = 0
    first = min(trained[0][0], trained[1][0])
    while start < first and chosen["input_ids"][start] == rejected["input_ids"][start]:
        start += 1
    joined = {"prompt_ids": chosen["input_ids"][:start]}
    for side, row, places in zip(_SIDES, (chosen, rejected), trained, strict=True):
        joined[f"{side}_ids"] = row["input_ids"][start : places[-1] + 1]
        joined[f"{side}_labels"] = row["labels"][start : places[-1] + 1]
    if joined["chosen_ids"] == joined["rejected_ids"]:
        return Dropped("has chosen equal to rejected in the template's form", EqualPair.kind)
    return joined
