"""Where the answers stand in what a tokenizer's own chat template renders."""

import os
import re
from collections.abc import Callable
from typing import Any

from utils.runtime.errors import UserError

Message = dict[str, Any]
Render = Callable[..., str]  # messages, and whether a prompt is wanted → text
_CONTENT = "\ue0ee"  # an answer that shares no character with what a prompt may set before it


class SpanNotFound(ValueError):
    """An answer whose place is not known exactly; the text completes "an answer that …"."""


def find_answer_span(
    messages: list[Message], turn: int, text: str, render: Render, special: re.Pattern
) -> tuple[int, int]:
    """Where an answer stands in the rendering of the whole conversation, with the tokens that end it.

    It begins where the prompt for it ends, or where the two part: many a prompt opens a thought that the answers of
    a conversation are shown without. It ends with the special tokens that end it where no turn follows.

        prompt  …<|im_start|>assistant\\n<think>\\n
        alone   …<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nHello<|im_end|>\\n
        whole   …<|im_start|>assistant\\nHello<|im_end|>\\n<|im_start|>user\\n…      span: Hello<|im_end|>

    Args:
        messages: of one conversation.
        turn: the answer's place among them.
        text: the rendering of `messages`.
        render: the template.
        special: matches the special tokens' texts.

    Raises:
        SpanNotFound: the answer's place is not known.
    """
    if turn == 0:
        return _first(messages, text, render, special)
    prompt = render(messages[:turn], True)
    alone = text if turn == len(messages) - 1 else render(messages[: turn + 1])
    begin = _begin(messages, turn, prompt, text, render)
    first = begin if alone is text else _begin(messages[: turn + 1], turn, prompt, alone, render)
    if begin is None or first is None:
        raise SpanNotFound("does not follow the prompt that the template gives for it")
    answer = alone[first:]
    content = _content_in(answer, messages[: turn + 1], alone, first, render)
    stop, end = _ends(answer, content, messages[turn], special)
    if end is None:
        raise SpanNotFound(
            "no special token ends, so that the model would not learn to stop; give the tokenizer a chat template "
            "that ends it with one (TRL's training templates do), or choose another --template_name"
        )
    size = _found_again(answer[:end], content, stop, text[begin:], special)
    if size is None:
        raise SpanNotFound("the template shows in another form once a turn follows")
    shown = text[begin : begin + size]
    # where the prompt after a tool's result has no opening of its own (DiffusionGemma)
    if special.match(shown) and (header := _opening(render)) and shown.startswith(header):
        return begin + len(header), begin + size
    return begin + _space_before(shown, messages[turn]), begin + size


def _opening(render: Render) -> str:
    """What a prompt ends with after a question: `<|im_start|>assistant\n`."""
    question = [{"role": "user", "content": _CONTENT}]
    prompt = render(question, True)
    return prompt[len(os.path.commonprefix([prompt, render(question)])) :]


def _begin(messages: list[Message], turn: int, prompt: str, text: str, render: Render) -> int | None:
    """Where the prompt for a turn ends in a rendering, or the part of it that stands there.

    Where earlier answers are shown otherwise than in the prompt, what counts is the prompt behind the text of the
    turn before this one.
    """
    if text.startswith(prompt):
        return len(prompt)
    before = messages[turn - 1]
    size = len(before["content"].rstrip())
    marked = {**before, "content": before["content"][:size] + _CONTENT + before["content"][size:]}
    probe = {"role": "assistant", "content": _CONTENT}
    try:
        place = _place(render([*messages[: turn - 1], marked, *messages[turn:]]), text)
        tail = prompt[_place(render([*messages[: turn - 1], marked], True), prompt) :]
        # without the opening of an answer, and with an answer that begins as no prompt does
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


def _place(marked: str, text: str) -> int:
    """Where the mark stands in a rendering that is `text` but for it.

    Raises:
        ValueError: it is another rendering.
    """
    place = marked.index(_CONTENT)
    if marked.replace(_CONTENT, "") != text:
        raise ValueError("another rendering")
    return place


def _first(messages: list[Message], text: str, render: Render, special: re.Pattern) -> tuple[int, int]:
    """An answer that nothing comes before: it begins where a prompt's own end stands before its content."""
    opening = _opening(render)
    marked = render([{**messages[0], "content": _CONTENT + messages[0]["content"].lstrip()}, *messages[1:]])
    begin = marked.find(_CONTENT)
    if begin < 0 or not opening or not text[:begin].endswith(opening):
        raise SpanNotFound("stands first, where no prompt comes before it")
    match = special.search(text, begin + len(messages[0]["content"].strip()))
    if match is None:
        raise SpanNotFound("no special token ends")
    return begin, match.end()


def _content_in(answer: str, messages: list[Message], alone: str, first: int, render: Render) -> int:
    """Where the content of an answer begins in it; -1 where it has none.

    A short content may stand in what the template sets before it as well, `i` in `<think>`. A character set before
    the content then shows which it is.

    Args:
        answer: as the last turn shows it.
        messages: up to the answer.
        alone: their rendering.
        first: where in that the answer begins.
        render: the template.
    """
    content = messages[-1].get("content") or ""
    said = content.strip()
    found = answer.find(said) if said else -1
    if found < 0 or found == answer.rfind(said):
        return found
    marked = content.replace(said, _CONTENT + said, 1)
    try:
        return _place(render([*messages[:-1], {**messages[-1], "content": marked}]), alone) - first
    except (UserError, ValueError):  # a thought in the content, which the template shows in its own way
        return found


def _ends(answer: str, found: int, message: Message, special: re.Pattern) -> tuple[int, int | None]:
    """Where the stop tokens of an answer, whose content begins at `found`, begin and end.

    The stop tokens are those that stand last with nothing but space between them; of these, only the first ones
    that stand directly one after the other: a template may set an eos token after a finished conversation.
    """
    said = (message.get("content") or "").strip()
    tokens = list(special.finditer(answer, max(found, 0) + len(said) if found >= 0 else 0))
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


def _found_again(answer: str, content: int, stop: int, text: str, special: re.Pattern) -> int | None:
    """How long an answer is at the beginning of `text`, where it may stand without its beginning or other stop token.

    A template shows earlier answers without the thought that it sets before the last one (Qwen3), or ends them with
    another token (gpt-oss: `<|end|>` for `<|return|>`).

    Args:
        answer: as the last turn shows it, with its stop tokens.
        content: where its content begins; -1 where it has none.
        stop: where its stop tokens begin.
        text: of the whole conversation, from the answer on.
        special: matches the special tokens' texts.
    """
    for start in range((content if content >= 0 else stop - 1) + 1):
        if text.startswith(answer[start:]):
            return len(answer) - start
    for start in range((content if content >= 0 else stop - 1) + 1):
        size = stop - start
        if size > 0 and text.startswith(answer[start:stop]) and (match := special.match(text, size)):
            return match.end()
    return None


def _space_before(answer: str, message: Message) -> int:
    """How many spaces the template sets before the content, which are not part of it."""
    said = message.get("content")
    found = answer.find(said) if isinstance(said, str) and said else -1
    return found if found > 0 and not answer[:found].strip() else 0
