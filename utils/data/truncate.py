"""Fitting a conversation into `max_len`: the oldest turns go first, an answer is never cut."""

import bisect
from collections.abc import Callable

from utils.data.report import TOO_LONG, Dropped
from utils.runtime.errors import UserError
from utils.template import Message, Template
from utils.template.tokenize import IGNORED


def encode_within(
    conversations: list[list[Message]], template: Template, tokenizer, max_len: int, truncate: bool = True, **options
) -> list[dict | Dropped]:
    """Encodes conversations so that none is longer than `max_len`.

    Args:
        conversations: messages each, which the template can hold; those of `cut_far` count as shortened.
        template: renders them.
        tokenizer: a fast one.
        max_len: tokens.
        truncate: whether a longer one is shortened rather than left out.
        **options: of `Template.encode`.

    Returns:
        for each `{"input_ids", "labels", "shortened", "notes"}`, or the reason why it cannot be trained.
    """

    def shorten(messages: list[Message], encoded: dict) -> dict | Dropped:
        shortened = isinstance(messages, Shortened)
        while (surplus := len(encoded["input_ids"]) - max_len) > 0:
            if not truncate:
                return Dropped(f"is too long for --max_len {max_len}", TOO_LONG)
            longer, messages = messages, shorter(messages, surplus, tokenizer)
            if messages is None:
                return Dropped(f"is too long for --max_len {max_len} with its answer, which is never cut", TOO_LONG)
            if not can_move_system(template, longer, messages):
                return Dropped(f"is too long for --max_len {max_len} and {SYSTEM_STAYS}", TOO_LONG)
            encoded, shortened = template.encode(messages, tokenizer, **options), True
        if encoded["labels"].count(IGNORED) == len(encoded["labels"]):
            return Dropped("has nothing to train")
        notes = template.notes(messages, options.get("train_on", "all_turns"))
        return {**encoded, "shortened": shortened, "notes": notes}

    encoded = template.encode_batch(conversations, tokenizer, **options)
    return [shorten(messages, row) for messages, row in zip(conversations, encoded, strict=True)]


_MANY = 32  # from so many questions on, even short ones, one turn after the other takes long
_CHARACTERS = 4  # from so many characters a token on a conversation is rendered to see whether it is far too long


class Shortened(list):
    """The messages of a conversation that has lost its oldest turns."""


def cut_far(messages: list[Message], template: Template, tokenizer, max_len: int) -> list[Message]:
    """Drops the oldest turns of a conversation that is far too long, so that no template has to read all of it.

    One turn after the other, each with a rendering, its tokens and its labels anew, would take time that grows with
    the square of the length, or worse. No turn is dropped that `encode_within` would keep.

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
    # as plain text: where a special token's text stands in a content, its encoding is longer
    return first_fit(messages, lambda rest: count_tokens(template.render(rest), tokenizer) > max_len)


def is_far(messages: list[Message], max_len: int) -> bool:
    """Whether a conversation is worth a rendering of its own to see whether it is far too long."""
    questions = sum(message["role"] == "user" for message in messages)
    characters = sum(len(message["content"]) for message in messages)
    return questions > _MANY or (questions > 1 and characters > _CHARACTERS * max_len)


def check_all(template: Template, kept: list[Message], messages: list[Message]) -> None:
    """Raises a `UserError` where a template cannot hold what is kept of a conversation, by the turns of the whole."""
    try:
        template.check(kept)
    except UserError:
        template.check(messages)
        raise


def first_fit(messages: list[Message], too_long: Callable[[list[Message]], bool]) -> list[Message]:
    """The conversation without its oldest turns, as few as it takes that it is not too long, or all that can go.

    Args:
        messages: ending with an answer.
        too_long: what holds of a conversation holds of every longer one.

    Returns:
        the messages themselves, or `Shortened`.
    """
    starts = _starts(messages)
    try:
        if not starts or not too_long(messages):
            return messages
        # from the last question back: how many of the starts leave little enough
        fitting = bisect.bisect_left(starts[::-1], True, key=lambda start: too_long(_from(messages, start)))
    except UserError:
        return messages  # what the template cannot hold is told by its check, turn by turn
    return Shortened(_from(messages, starts[-max(1, fitting)]))


def count_tokens(text: str, tokenizer) -> int:
    """How many tokens a rendering has."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def shorter(messages: list[Message], surplus: int, tokenizer) -> list[Message] | None:
    """The conversation without its oldest turn, or with a shorter question; None where neither can go.

    Args:
        messages: ending with an answer.
        surplus: how many tokens it is too long.
        tokenizer: a fast one.
    """
    return _without_oldest_turn(messages) or _with_shorter_question(messages, surplus, tokenizer)


SYSTEM_STAYS = "has a system message among the turns that would have to go, which the template has no other place for"


def can_move_system(template: Template, messages: list[Message], kept: list[Message]) -> bool:
    """Whether a template has a form for what is kept, where later system messages have come to stand at its start."""
    if _count_head(kept) == _count_head(messages):
        return True
    try:
        template.check(kept)
    except UserError:
        return False
    return True


def _count_head(messages: list[Message]) -> int:
    """With how many system messages a conversation begins."""
    return next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))


def _split_head(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    count = _count_head(messages)
    return messages[:count], messages[count:]


def _without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """Drops the turns before the second question, but no system message; None if there is no second."""
    starts = _starts(messages)
    return _from(messages, starts[0]) if starts else None


def _starts(messages: list[Message]) -> list[int]:
    """The questions a shortened conversation may begin with: all but the first, as long as an answer follows."""
    turns = _split_head(messages)[1]
    last = max((i for i, message in enumerate(turns) if message["role"] == "assistant"), default=0)
    return [i for i, message in enumerate(turns[:last]) if message["role"] == "user" and i > 0]


def _from(messages: list[Message], start: int) -> list[Message]:
    """The turns from `start` on, after every system message that stands before them."""
    head, turns = _split_head(messages)
    later = [message for message in turns[:start] if message["role"] == "system"]
    return _keep_tools([*head, *later, *turns[start:]], messages)


def _keep_tools(shorter: list[Message], messages: list[Message]) -> list[Message]:
    """The tools of a conversation stand with its first message."""
    if "tools" not in messages[0] or "tools" in shorter[0]:
        return shorter
    return [{**shorter[0], "tools": messages[0]["tools"]}, *shorter[1:]]


def _with_shorter_question(messages: list[Message], surplus: int, tokenizer) -> list[Message] | None:
    """Cuts the beginning of the only question left by `surplus` tokens; None if nothing would be left of it."""
    head, turns = _split_head(messages)
    if turns[0]["role"] != "user":
        return None
    question = turns[0]["content"]
    offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) <= surplus:
        return None
    cut = question[max(1, offsets[surplus][0]) :]
    return [*head, {**turns[0], "content": cut}, *turns[1:]] if cut.strip() else None
