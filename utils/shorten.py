"""Fitting a conversation into `max_len`: the oldest turns go first, an answer is never cut."""

from utils.data_report import TOO_LONG, Dropped
from utils.template import IGNORED, Message, Template


def encode_within(
    conversations: list[list[Message]], template: Template, tokenizer, max_len: int, truncate: bool = True, **options
) -> list[dict | Dropped]:
    """Encodes conversations so that none is longer than `max_len`.

    Args:
        conversations: messages each, which the template can hold.
        template: renders them.
        tokenizer: a fast one.
        max_len: tokens.
        truncate: whether a longer one is shortened rather than left out.
        **options: of `Template.encode`.

    Returns:
        for each `{"input_ids", "labels", "shortened", "notes"}`, or the reason why it cannot be trained.
    """

    def shorten(messages: list[Message], encoded: dict) -> dict | Dropped:
        shortened = False
        while (surplus := len(encoded["input_ids"]) - max_len) > 0:
            if not truncate:
                return Dropped(f"is too long for --max_len {max_len}", TOO_LONG)
            messages = shorter(messages, surplus, tokenizer)
            if messages is None:
                return Dropped(f"is too long for --max_len {max_len} with its answer, which is never cut", TOO_LONG)
            encoded, shortened = template.encode(messages, tokenizer, **options), True
        if encoded["labels"].count(IGNORED) == len(encoded["labels"]):
            return Dropped("has nothing to train")
        return {**encoded, "shortened": shortened, "notes": template.notes(messages, options.get("train_on", "all_turns"))}

    encoded = template.encode_batch(conversations, tokenizer, **options)
    return [shorten(messages, row) for messages, row in zip(conversations, encoded, strict=True)]


def shorter(messages: list[Message], surplus: int, tokenizer) -> list[Message] | None:
    """The conversation without its oldest turn, or with a shorter question; None where neither can go.

    Args:
        messages: ending with an answer.
        surplus: how many tokens it is too long.
        tokenizer: a fast one.
    """
    return _without_oldest_turn(messages) or _with_shorter_question(messages, surplus, tokenizer)


def _split_head(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    count = 1 if messages[0]["role"] == "system" else 0
    return messages[:count], messages[count:]


def _without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """Drops everything between the system message and the second question; None if there is no second."""
    head, turns = _split_head(messages)
    later = [i for i, message in enumerate(turns) if message["role"] == "user" and i > 0]
    start = next((i for i in later if any(m["role"] == "assistant" for m in turns[i:])), None)
    return None if start is None else _keep_tools(head + turns[start:], messages)


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
