"""Pieces of a rendering → token ids and labels, in one tokenisation of the whole."""

import re
from itertools import chain
from typing import Any, NamedTuple

from utils.runtime.errors import UserError

IGNORE_INDEX = -100  # the label of a token that is not trained (torch's cross_entropy default)
# private-use characters: set into the text of a special token, one keeps that from becoming the token. The first 16
# are used nowhere else in this project; all others that Unicode has follow, for a text that holds these.
_BREAKS = (range(0xE0F0, 0xE100), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE), range(0xE000, 0xF900))


class Segment(NamedTuple):
    """A piece of a rendering.

    Attributes:
        text: what it says.
        trained: whether it is an answer or the stop token that ends it.
        content: whether it comes from the data, rather than from the format.
        answer: of a content, whether it is the assistant's.
    """

    text: str
    trained: bool = False
    content: bool = False
    answer: bool = False


class EscapePatterns(NamedTuple):
    """Which texts of the data are kept from becoming tokens of the format, as `escape_patterns` finds them.

    Attributes:
        answers: matches them in what the assistant says.
        others: in all else.
    """

    answers: re.Pattern | None
    others: re.Pattern | None


def encode_segments(
    conversations: list[list[Segment]],
    tokenizer,
    allow_special: bool = False,
    marks: list[str] | None = None,
    written: str = "",
) -> list[dict[str, list[int]]]:
    """Tokenises renderings and labels their trained pieces, found again by character offsets.

    The tokens of a special token's text within a content are those of plain text, so that data
    cannot forge a turn.

    Args:
        conversations: the pieces of each rendering.
        tokenizer: a fast one.
        allow_special: whether such a text becomes the special token after all.
        marks: for each conversation the break that stands in its pieces already, from `escape_messages`.
        written: what the format itself writes, as for `escape_patterns`.

    Returns:
        for each `{"input_ids": [L], "labels": [L]}`
    """
    special = None if allow_special else escape_patterns(tokenizer, written)
    texts, spans, breaks = [], [], []
    for segments in conversations:
        segments, mark = _escape_segments(segments, special)
        mark = mark or (marks and marks[len(texts)])
        text, trained = "", []
        for segment in segments:
            if segment.trained and segment.text:
                trained.append((len(text), len(text) + len(segment.text)))
            text += segment.text
        texts.append(text)
        spans.append(trained)
        breaks.append(mark)
    encoded = _encode_texts(texts, tokenizer)
    special_ids = frozenset(tokenizer.added_tokens_decoder)
    rows = []
    for i, encoding in enumerate(encoded):
        ids = encoding.ids
        labels = _label_ranges(encoding, ids, spans[i])
        if labels is None:
            labels = label_spans(ids, encoding.offsets, spans[i], special_ids)
        if breaks[i]:
            kept = [k for k, (start, end) in enumerate(encoding.offsets) if texts[i][start:end] != breaks[i]]
            ids, labels = [ids[k] for k in kept], [labels[k] for k in kept]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def _encode_texts(texts: list[str], tokenizer) -> list:
    """As `tokenizer(texts, add_special_tokens=False)`, without the lists of numbers that it makes of everything."""
    backend = tokenizer.backend_tokenizer
    # what the tokenizer itself sets back at every call
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend.encode_batch(texts, add_special_tokens=False)


def _label_ranges(encoding, ids: list[int], spans: list[tuple[int, int]]) -> list[int] | None:
    """As `label_spans`, without an object for each token; None where a token crosses an end of a span."""
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans:
        first, after = encoding.char_to_token(start), encoding.char_to_token(end)
        after = len(ids) if after is None else after
        if first is None or not first < after:
            return None
        ends = encoding.token_to_chars(first), encoding.token_to_chars(after - 1)
        if None in ends or ends[0][0] != start or ends[1][1] != end:
            return None
        labels[first:after] = ids[first:after]
    return labels


def pick_escape_char(text: str) -> str:
    """A private-use character that `text` does not hold.

    Raises:
        UserError: it holds all of them.
    """
    for character in map(chr, chain(*_BREAKS)):
        if character not in text:
            return character
    raise UserError("a conversation holds every private-use character of Unicode; remove some of them from it")


def split_at_spans(text: str, trained: list[tuple[int, int]]) -> list[Segment]:
    """Cuts a rendering where something trained begins or ends.

    `split_at_spans("ab", [(1, 2)])` → `[Segment("a"), Segment("b", trained=True)]`
    """
    cuts = sorted({0, len(text), *(place for span in trained for place in span)})
    return [
        Segment(text[start:end], any(begin <= start < stop for begin, stop in trained))
        for start, end in zip(cuts, cuts[1:], strict=False)
    ]


def escape_messages(messages: list[dict[str, Any]], breaks: EscapePatterns, mark: str) -> list[dict[str, Any]]:
    """Sets the break into every such text within messages, their tools and tool calls, keys among them."""
    broken = []
    for message in messages:
        own = breaks.answers if message.get("role") == "assistant" else breaks.others
        broken.append({
            escape_special_tokens(key, breaks.others, mark):
            item if key == "role" else escape_special_tokens(item, breaks.others if key == "tools" else own, mark)
            for key, item in message.items()
        })  # fmt: skip
    return broken


def escape_special_tokens(value: Any, special: re.Pattern | None, mark: str) -> Any:
    """Sets the break into every text of a value that `special` matches, keys among them."""
    if special is None:
        return value
    if isinstance(value, dict):
        return {
            escape_special_tokens(key, special, mark): escape_special_tokens(item, special, mark)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [escape_special_tokens(item, special, mark) for item in value]
    return _escape(value, special, mark) if isinstance(value, str) else value


def _escape(text: str, special: re.Pattern, mark: str) -> str:
    while special.search(text):
        text = special.sub(lambda match: match[0][0] + mark + match[0][1:], text)
    return text


def special_token_pattern(tokenizer) -> re.Pattern | None:
    """Matches the text of any special token of two characters or more."""
    return _alternation(_special_texts(tokenizer))


def _special_texts(tokenizer) -> set[str]:
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {name for name in names | set(tokenizer.all_special_tokens) if len(name) > 1}


def _alternation(names: set[str]) -> re.Pattern | None:
    # the longest first, since a regular expression takes the first that matches
    ordered = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered))) if names else None


def escape_patterns(tokenizer, written: str) -> EscapePatterns:
    """Which texts of the data would be tokens of the format.

    The special tokens anywhere; and of the tokens added to the vocabulary that are not special, those that the format
    itself writes. An answer may hold these, since thoughts and tool calls are written with them, but for one that
    names a role: `<｜User｜>` (DeepSeek-R1) is broken anywhere, `</think>` and `<tool_response>` (Qwen3) only in what
    the assistant does not say.

    Args:
        tokenizer: the model's.
        written: what the format itself writes, such as the text of a Jinja template.
    """
    special = _special_texts(tokenizer)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()} - special
    # a tokenizer may have spaces, words and operators as added tokens too, which in a template are plain text or code
    tags = {name for name in added if re.fullmatch(r"[^\w\s].*\w.*[^\w\s]", name) and name in written}
    roles = {name for name in tags if re.search("user|assistant|system|human", name, re.IGNORECASE)}
    return EscapePatterns(_alternation(special | roles), _alternation(special | tags))


def _escape_segments(segments: list[Segment], breaks: EscapePatterns | None) -> tuple[list[Segment], str | None]:
    """Sets a break into each such text within a content: `"a<|im_end|>"` → `"a<\ue0f0|im_end|>"`.

    Returns:
        the segments, and the break, or None where there was nothing to break.
    """
    patterns = [breaks and s.content and (breaks.answers if s.answer else breaks.others) for s in segments]
    if not any(special and special.search(s.text) for s, special in zip(segments, patterns, strict=True)):
        return segments, None
    mark = pick_escape_char("".join(segment.text for segment in segments))
    return [
        s._replace(text=_escape(s.text, special, mark)) if special else s
        for s, special in zip(segments, patterns, strict=True)
    ], mark


def label_spans(
    ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], special: frozenset[int] = frozenset()
) -> list[int]:
    """Labels the tokens that cover any character of the spans; both come in order.

    `label_spans([7, 8, 9], [(0, 2), (2, 3), (3, 5)], [(2, 5)])` → `[-100, 8, 9]`

    Args:
        ids: token ids, [L].
        offsets: each token's start and end in the text, [L].
        spans: starts and ends of the trained text.
        special: ids that belong to the format. Some tokenizers let such a token swallow the spaces
            after it, the answer's first ones among them; it is not trained for that.

    Returns:
        [L], -100 where nothing is trained.
    """
    labels = [IGNORE_INDEX] * len(ids)
    position = 0
    for start, end in spans:
        while position < len(ids) and offsets[position][1] <= start:
            position += 1
        while position < len(ids) and offsets[position][0] < end:
            if offsets[position][0] >= start or ids[position] not in special:
                labels[position] = ids[position]
            position += 1
    return labels
