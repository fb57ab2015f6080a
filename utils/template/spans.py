"""Locates an answer in the text that a tokenizer's own chat template renders."""

import os
import re
from collections.abc import Callable

from utils.runtime.errors import UserError
from utils.template.messages import Message

Render = Callable[..., str]  # messages, add_generation_prompt → text
_MARKER = "\ue0ee"  # a content that shares no character with any chat format


class SpanNotFound(ValueError):
    """The answer cannot be located exactly; the message completes "an answer that …"."""


def find_answer_span(
    messages: list[Message], turn: int, text: str, render: Render, special: re.Pattern
) -> tuple[int, int]:
    """Locates an answer, with the tokens that end it, in the rendering of the whole conversation.

    It begins where its generation prompt ends, or where the two differ: many prompts open a reasoning block that
    earlier answers are rendered without. It ends with the special tokens that end it as the last turn.

        prompt  …<|im_start|>assistant\\n<think>\\n
        alone   …<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nHello<|im_end|>\\n
        whole   …<|im_start|>assistant\\nHello<|im_end|>\\n<|im_start|>user\\n…      span: Hello<|im_end|>

    Args:
        messages: one conversation.
        turn: index of the answer.
        text: the rendering of `messages`.
        render: the template.
        special: matches the text of any special token.

    Returns:
        start and end in `text`.

    Raises:
        SpanNotFound: the answer cannot be located exactly.
    """
    if turn == 0:
        return _find_first(messages, text, render, special)
    prompt = render(messages[:turn], True)
    alone = text if turn == len(messages) - 1 else render(messages[: turn + 1])
    begin = _find_begin(messages, turn, prompt, text, render)
    first = begin if alone is text else _find_begin(messages[: turn + 1], turn, prompt, alone, render)
    if begin is None or first is None:
        raise SpanNotFound("does not follow the prompt that the template gives for it")
    answer = alone[first:]
    content = _find_content(answer, messages[: turn + 1], alone, first, render)
    stop, end = _stop_tokens(answer, content, messages[turn], special)
    if end is None:
        raise SpanNotFound(
            "no special token ends, so the model would not learn to stop; give the tokenizer a chat template "
            "that ends it with one (TRL's training templates do), or choose another --template_name"
        )
    size = _matching_length(answer[:end], content, stop, text[begin:], special)
    if size is None:
        raise SpanNotFound("the template shows in another form once a turn follows")
    shown = text[begin : begin + size]
    # the prompt after a tool's result may lack the opening that the answer is rendered with (DiffusionGemma)
    if special.match(shown) and (header := _opening(render)) and shown.startswith(header):
        return begin + len(header), begin + size
    return begin + _leading_space(shown, messages[turn]), begin + size


def _opening(render: Render) -> str:
    """Returns what a generation prompt adds to a question: `<|im_start|>assistant\\n`."""
    question = [{"role": "user", "content": _MARKER}]
    prompt = render(question, True)
    return prompt[len(os.path.commonprefix([prompt, render(question)])) :]


def _find_begin(messages: list[Message], turn: int, prompt: str, text: str, render: Render) -> int | None:
    """Returns where the generation prompt of a turn, or the beginning of it that is rendered, ends in a rendering.

    If earlier answers are rendered differently in the prompt, only the part of the prompt after the content of the
    previous turn is compared. None if the rendering contains no part of the prompt's opening.
    """
    if text.startswith(prompt):
        return len(prompt)
    before = messages[turn - 1]
    size = len(before["content"].rstrip())
    marked = {**before, "content": before["content"][:size] + _MARKER + before["content"][size:]}
    probe = {"role": "assistant", "content": _MARKER}
    try:
        place = _marker_index(render([*messages[: turn - 1], marked, *messages[turn:]]), text)
        tail = prompt[_marker_index(render([*messages[: turn - 1], marked], True), prompt) :]
        # a prompt without the opening of an answer, and an answer whose beginning no prompt shares
        plain = render(messages[:turn])
        other = render([*messages[:turn], probe, *messages[turn + 1 :]])
    except (UserError, ValueError):
        return None
    if text.startswith(tail, place):
        return place + len(tail)
    rest = plain[len(prompt) - len(tail) :] if plain.startswith(prompt[: len(prompt) - len(tail)]) else ""
    shared = len(os.path.commonprefix([tail, other[place:]])) if other.startswith(text[:place]) else 0
    header = len(os.path.commonprefix([tail, rest]))
    return place + shared if shared > header and text.startswith(tail[:shared], place) else None


def _marker_index(marked: str, text: str) -> int:
    """Returns where the marker is in a rendering that otherwise equals `text`.

    Raises:
        ValueError: the renderings differ otherwise.
    """
    place = marked.index(_MARKER)
    if marked.replace(_MARKER, "") != text:
        raise ValueError("the renderings differ")
    return place


def _find_first(messages: list[Message], text: str, render: Render, special: re.Pattern) -> tuple[int, int]:
    """Locates an answer at the very beginning: it starts at its content, which must follow the opening of an answer."""
    opening = _opening(render)
    marked = render([{**messages[0], "content": _MARKER + messages[0]["content"].lstrip()}, *messages[1:]])
    begin = marked.find(_MARKER)
    if begin < 0 or not opening or not text[:begin].endswith(opening):
        raise SpanNotFound("is the first message, without a prompt before it")
    match = special.search(text, begin + len(messages[0]["content"].strip()))
    if match is None:
        raise SpanNotFound("no special token ends")
    return begin, match.end()


def _find_content(answer: str, messages: list[Message], alone: str, first: int, render: Render) -> int:
    """Returns where the content of an answer begins in it; -1 if it has none.

    A short content may also occur in what the template writes before it, `i` in `<think>`. A marker in front of the
    content then shows which occurrence it is.

    Args:
        answer: as the last turn renders it.
        messages: up to the answer.
        alone: their rendering.
        first: start of the answer in that.
        render: the template.
    """
    content = messages[-1].get("content") or ""
    stripped = content.strip()
    found = answer.find(stripped) if stripped else -1
    if found < 0 or found == answer.rfind(stripped):
        return found
    marked = content.replace(stripped, _MARKER + stripped, 1)
    try:
        return _marker_index(render([*messages[:-1], {**messages[-1], "content": marked}]), alone) - first
    except (UserError, ValueError):  # reasoning in the content, which the template rewrites
        return found


def _stop_tokens(answer: str, found: int, message: Message, special: re.Pattern) -> tuple[int, int | None]:
    """Returns start and end of the stop tokens of an answer; the end is None if there are none.

    They are the special tokens at the end of the rendering with only whitespace between them, up to the first gap: a
    template may add an EOS token after a complete conversation.

    Args:
        answer: as the last turn renders it.
        found: where its content begins; -1 if it has none.
        message: the answer.
        special: matches the text of any special token.
    """
    content = (message.get("content") or "").strip()
    tokens = list(special.finditer(answer, max(found, 0) + len(content) if found >= 0 else 0))
    first, after = len(tokens), None
    while first and not answer[tokens[first - 1].end() : after].strip():
        first -= 1
        after = tokens[first].start()
    if first == len(tokens):
        return 0, None
    last = first
    while last + 1 < len(tokens) and tokens[last].end() == tokens[last + 1].start():
        last += 1
    return tokens[first].start(), tokens[last].end()


def _matching_length(answer: str, content: int, stop: int, text: str, special: re.Pattern) -> int | None:
    """Returns the length of an answer at the beginning of `text`; None if it is rendered in another form there.

    A template may render earlier answers without the reasoning it adds to the last one (Qwen3), or end them with
    another token (gpt-oss: `<|end|>` for `<|return|>`).

    Args:
        answer: as the last turn renders it, with its stop tokens.
        content: where its content begins; -1 if it has none.
        stop: where its stop tokens begin.
        text: the rendering of the whole conversation from the answer on.
        special: matches the text of any special token.
    """
    for start in range((content if content >= 0 else stop - 1) + 1):
        if text.startswith(answer[start:]):
            return len(answer) - start
    for start in range((content if content >= 0 else stop - 1) + 1):
        size = stop - start
        if size > 0 and text.startswith(answer[start:stop]) and (match := special.match(text, size)):
            return match.end()
    return None


def _leading_space(answer: str, message: Message) -> int:
    """Counts the whitespace characters that the template adds before a content."""
    content = message.get("content")
    found = answer.find(content) if isinstance(content, str) and content else -1
    return found if found > 0 and not answer[:found].strip() else 0
