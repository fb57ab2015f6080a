"""Segments of a rendered conversation → token ids and labels, in one tokenisation of the whole text."""

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

from utils.runtime.errors import UserError

IGNORE_INDEX = -100  # the label of a token that is not trained: `ignore_index` of torch's cross_entropy
# Private-use characters. One of them, inserted into the text of a special token, keeps the tokenizer from making that
# token of it. The first 16 have no other use in this project; the rest are for texts that contain all of those.
_ESCAPE_CHARS = (range(0xE0F0, 0xE100), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE), range(0xE000, 0xF900))


class Segment(NamedTuple):
    """A piece of a rendered conversation.

    Attributes:
        text: the characters.
        trained: the weight of its losses, 0 where it gets no labels: an answer and the stop token after it have 1, or
            the weight that the data gives the answer.
        content: whether it comes from the data rather than from the chat format.
        answer: whether it is part of an assistant's message, its content or its stop token.
    """

    text: str
    trained: float = 0
    content: bool = False
    answer: bool = False


class EscapePatterns(NamedTuple):
    """What must be escaped in the data, since the tokenizer would make tokens of the chat format of it.

    Attributes:
        answers: matches it in the assistant's messages; None where there is nothing to escape.
        others: matches it in all other text.
    """

    answers: re.Pattern | None
    others: re.Pattern | None


def encode_segments(
    conversations: list[list[Segment]],
    tokenizer,
    allow_special: bool = False,
    escape_chars: list[str] | None = None,
    format_text: str = "",
) -> list[dict[str, list[int]]]:
    """Tokenises conversations and labels their trained segments, which are located by character offsets.

    The text of a special token within a content is tokenised as plain text, so that data cannot forge a turn.

    Args:
        conversations: the segments of each.
        tokenizer: a fast one.
        allow_special: whether such a text becomes the special token after all.
        escape_chars: for each conversation the character with which its segments are escaped already.
        format_text: what the chat format itself writes, as for `escape_patterns`.

    Returns:
        for each conversation `{"input_ids": [L], "labels": [L]}`, and `"loss_weights": [L]` if any segment has another
        weight than 0 and 1.
    """
    patterns = None if allow_special else escape_patterns(tokenizer, format_text)
    texts, spans, weights, escapes = [], [], [], []
    for segments in conversations:
        segments, escape_char = _escape_segments(segments, patterns)
        if escape_chars and (escape_char := escape_chars[len(texts)]):
            # as Python writes it within a list, which LFM2.5's template prints
            written = ascii(escape_char)[1:-1]
            segments = [segment._replace(text=segment.text.replace(written, escape_char)) for segment in segments]
        escapes.append(escape_char)
        for parts, part in zip((texts, spans, weights), _join(segments), strict=True):
            parts.append(part)
    encoded = encode_texts(texts, tokenizer)
    special_ids = frozenset(tokenizer.added_tokens_decoder)
    rows = []
    for text, encoding, trained, factors, escape_char in zip(texts, encoded, spans, weights, escapes, strict=True):
        ids = encoding.ids
        labels = _label_ranges(encoding, ids, trained)
        if labels is None:
            labels = label_spans(ids, encoding.offsets, trained, special_ids)
        row = {"input_ids": ids, "labels": labels}
        if any(factor != 1 for factor in factors):
            row["loss_weights"] = _weigh_spans(ids, encoding.offsets, trained, factors, special_ids)
        if escape_char and escape_char in text:
            kept = [k for k, (start, end) in enumerate(encoding.offsets) if text[start:end] != escape_char]
            row = {name: [column[k] for k in kept] for name, column in row.items()}
        rows.append(row)
    return rows


def _weigh_spans(ids: list[int], offsets: list, spans: list, factors: list[float], special: frozenset[int]) -> list:
    """The weight of each token's loss, [L]: that of the span that labels it, and 1 where none does."""
    weights = [1.0] * len(ids)
    for span, position in _tokens_in(ids, offsets, spans, special):
        weights[position] = factors[span]
    return weights


def _join(segments: list[Segment]) -> tuple[str, list[tuple[int, int]], list[float]]:
    """Joins segments; returns the text, start and end of each trained piece of it, and the weights of these."""
    text, trained, weights = "", [], []
    for segment in segments:
        start, text = len(text), text + segment.text
        if not segment.trained or not segment.text:
            continue
        if trained and trained[-1][1] == start and weights[-1] == segment.trained:
            trained[-1] = (trained[-1][0], len(text))
        else:
            trained.append((start, len(text)))
            weights.append(segment.trained)
    return text, trained, weights


def encode_texts(texts: list[str], tokenizer) -> list:
    """As `tokenizer(texts, add_special_tokens=False)`, without its conversion of every encoding to Python lists."""
    backend = tokenizer.backend_tokenizer
    # the state that the tokenizer itself resets at every call
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend.encode_batch(texts, add_special_tokens=False)


def _label_ranges(encoding, ids: list[int], spans: list[tuple[int, int]]) -> list[int] | None:
    """As `label_spans`, without a Python object for each token; None where a token crosses the end of a span."""
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


def label_spans(
    ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], special: frozenset[int] = frozenset()
) -> list[int]:
    """Labels the tokens that cover any character of the spans; tokens and spans are both in order.

    `label_spans([7, 8, 9], [(0, 2), (2, 3), (3, 5)], [(2, 5)])` → `[-100, 8, 9]`

    Args:
        ids: token ids, [L].
        offsets: start and end of each token in the text, [L].
        spans: start and end of each trained text.
        special: ids of special tokens. One that begins before a span is not trained: some tokenizers let such a token
            swallow the spaces after it, which may be the first ones of an answer.

    Returns:
        [L], -100 where nothing is trained.
    """
    labels = [IGNORE_INDEX] * len(ids)
    for _, position in _tokens_in(ids, offsets, spans, special):
        labels[position] = ids[position]
    return labels


def _tokens_in(ids: list[int], offsets: list, spans: list, special: frozenset[int]) -> Iterator[tuple[int, int]]:
    """Yields the number of a span and the position of a token that belongs to it; arguments as in `label_spans`."""
    position = 0
    for number, (start, end) in enumerate(spans):
        while position < len(ids) and offsets[position][1] <= start:
            position += 1
        while position < len(ids) and offsets[position][0] < end:
            if offsets[position][0] >= start or ids[position] not in special:
                yield number, position
            position += 1


def split_at_spans(text: str, answers: list[tuple[int, int]], weights: list[float] | None = None) -> list[Segment]:
    """Splits a text where an answer begins or ends.

    `split_at_spans("ab", [(1, 2)])` → `[Segment("a"), Segment("b", trained=1, answer=True)]`

    Args:
        text: of a conversation.
        answers: start and end of each.
        weights: of each, 0 for one that is not trained; None if all are 1.
    """
    weights = [1] * len(answers) if weights is None else weights
    cuts = sorted({0, len(text), *(place for span in answers for place in span)})
    segments = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        own = [weight for (begin, stop), weight in zip(answers, weights, strict=True) if begin <= start < stop]
        segments.append(Segment(text[start:end], own[0] if own else 0, answer=bool(own)))
    return segments


def train_everything(segments: list[Segment]) -> list[Segment]:
    """Trains all segments but the answers that the data excludes: `--train_on prompt`."""
    return [segment if segment.trained or segment.answer else segment._replace(trained=1) for segment in segments]


# ------------------------------------------------------------------------------ special tokens within the data


def special_token_pattern(tokenizer) -> re.Pattern | None:
    """Returns a pattern that matches the text of any special token of two characters or more; None without any."""
    return _alternation(_special_texts(tokenizer))


def escape_patterns(tokenizer, format_text: str) -> EscapePatterns:
    """Finds which texts of the data must be escaped.

    These are the special tokens anywhere; and of the other added tokens those that the chat format itself writes. An
    answer may contain the latter, since reasoning and tool calls are written with them, unless they name a role:
    `<｜User｜>` (DeepSeek-R1) is escaped anywhere, `</think>` and `<tool_response>` (Qwen3) only outside answers.

    Args:
        tokenizer: the model's.
        format_text: what the chat format itself writes, such as the text of a Jinja template.
    """
    special = _special_texts(tokenizer)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()} - special
    # added tokens may also be spaces, words and operators, which are plain text or code in a Jinja template
    tags = {name for name in added if re.fullmatch(r"[^\w\s].*\w.*[^\w\s]", name) and name in format_text}
    roles = {name for name in tags if re.search("user|assistant|system|human", name, re.IGNORECASE)}
    return EscapePatterns(_alternation(special | roles), _alternation(special | tags))


def pick_escape_char(text: str) -> str:
    """Returns a private-use character that `text` does not contain.

    Raises:
        UserError: it contains all of them.
    """
    for character in map(chr, chain(*_ESCAPE_CHARS)):
        if character not in text and ascii(character)[1:-1] not in text:
            return character
    raise UserError("a conversation contains every private-use character of Unicode; remove some of them from it")


def escape_messages(messages: list[dict[str, Any]], patterns: EscapePatterns, char: str) -> list[dict[str, Any]]:
    """Escapes special tokens in all texts of messages, their tools and tool calls, keys included."""
    escaped = []
    for message in messages:
        own = patterns.answers if message.get("role") == "assistant" else patterns.others
        escaped.append({
            escape_special_tokens(key, patterns.others, char):
            # what the arguments of a call hold is data, since the format itself writes the tags around a call
            item if key == "role" else
            escape_special_tokens(item, patterns.others if key in ("tools", "tool_calls") else own, char)
            for key, item in message.items()
        })  # fmt: skip
    return escaped


def escape_special_tokens(value: Any, pattern: re.Pattern | None, char: str) -> Any:
    """Inserts `char` into every match of `pattern` in a text, or in all texts of nested lists and objects."""
    if pattern is None:
        return value
    if isinstance(value, dict):
        pairs = ((escape_special_tokens(key, pattern, char), item) for key, item in value.items())
        return {key: escape_special_tokens(item, pattern, char) for key, item in pairs}
    if isinstance(value, list):
        return [escape_special_tokens(item, pattern, char) for item in value]
    return _escape(value, pattern, char) if isinstance(value, str) else value


def _escape(text: str, pattern: re.Pattern, char: str) -> str:
    while pattern.search(text):
        text = pattern.sub(lambda match: match[0][0] + char + match[0][1:], text)
    return text


def _escape_segments(segments: list[Segment], patterns: EscapePatterns | None) -> tuple[list[Segment], str | None]:
    """Escapes special tokens in the contents: `"a<|im_end|>"` → `"a<\ue0f0|im_end|>"`.

    Returns:
        the segments, and the escape character; None if nothing had to be escaped.
    """
    own = [patterns and s.content and (patterns.answers if s.answer else patterns.others) for s in segments]
    if not any(pattern and pattern.search(s.text) for s, pattern in zip(segments, own, strict=True)):
        return segments, None
    char = pick_escape_char("".join(segment.text for segment in segments))
    return [
        s._replace(text=_escape(s.text, pattern, char)) if pattern else s
        for s, pattern in zip(segments, own, strict=True)
    ], char


def _special_texts(tokenizer) -> set[str]:
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {name for name in names | set(tokenizer.all_special_tokens) if len(name) > 1}


def _alternation(texts: set[str]) -> re.Pattern | None:
    """Returns a pattern that matches any of the texts, the longest first; None without any."""
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, ordered))) if texts else None
