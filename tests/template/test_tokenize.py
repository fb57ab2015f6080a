"""Segments are tokenised in one piece: labels by ranges and by offsets, escape characters."""

import copy

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.conversations import to_messages
from utils.runtime.errors import UserError
from utils.template import get_template
from utils.template.tokenize import (
    Segment,
    _label_ranges,
    encode_segments,
    encode_texts,
    label_spans,
    pick_escape_char,
)

TEXT = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from(" \n🙂é你好<|im_end|>"), max_size=12)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=6))
def test_labels_by_ranges_are_those_by_offsets(pieces):
    """Where `_label_ranges` answers at all, it says what the plain walk over the offsets says."""
    tokenizer, text, spans = tiny.byte_level_tokenizer(), "", []
    for piece, trained in pieces:
        if trained and piece:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    encoding = encode_texts([text], tokenizer)[0]
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoding.ids == plain["input_ids"]
    labels = _label_ranges(encoding, encoding.ids, spans)
    special = frozenset(tokenizer.added_tokens_decoder)
    assert labels in (None, label_spans(plain["input_ids"], plain["offset_mapping"], spans, special))


def test_ranges_serve_every_family(tokenizer):
    """The quick way is the one that is taken, or it would be quick for nobody."""
    template = get_template("qwen", tokenizer)
    for row in tiny.ROWS:
        segments = list(template.segments(to_messages(row)))
        text = "".join(segment.text for segment in segments)
        ends = [sum(len(s.text) for s in segments[:i]) for i in range(len(segments) + 1)]
        spans = [(ends[i], ends[i + 1]) for i, segment in enumerate(segments) if segment.trained]
        encoding = encode_texts([text], tokenizer)[0]
        assert _label_ranges(encoding, encoding.ids, spans) is not None


@pytest.mark.parametrize("text", ["a  b", "a\n\n\nb", "🙂🙂", "the fox"])
def test_a_token_that_crosses_the_end_of_an_answer(tokenizer, text):
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = plain["input_ids"], plain["offset_mapping"]
    for cut in range(1, len(text)):
        for trained, span in ((False, (cut, len(text))), (True, (0, cut))):
            row = encode_segments([[Segment(text[:cut], trained), Segment(text[cut:], not trained)]], tokenizer)[0]
            assert row == {"input_ids": ids, "labels": label_spans(ids, offsets, [span])}


def test_settings_left_in_the_tokenizer_do_not_count(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    whole = encode_segments([[Segment("a long enough text")]], tokenizer)
    tokenizer(["a long text"], truncation=True, max_length=2, padding="max_length")
    assert encode_segments([[Segment("a long enough text")]], tokenizer) == whole


PRIVATE = [
    chr(code) for codes in ((0xE000, 0xF900), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE)) for code in range(*codes)
]


def test_every_private_use_character_may_be_the_break():
    assert pick_escape_char("".join(PRIVATE[:-1])) == PRIVATE[-1]
    assert pick_escape_char("".join(PRIVATE).replace("\uf8ff", "")) == "\uf8ff"
    with pytest.raises(UserError, match="every private-use character"):
        pick_escape_char("".join(PRIVATE))


def test_label_spans():
    offsets = [(0, 2), (2, 3), (3, 5)]
    assert label_spans([7, 8, 9], offsets, [(2, 5)]) == [-100, 8, 9]
    assert label_spans([7, 8, 9], offsets, []) == [-100] * 3
    # a character of several tokens, as bytes of an emoji have it, is trained whole
    assert label_spans([1, 2, 3], [(0, 1), (1, 2), (1, 2)], [(1, 2)]) == [-100, 2, 3]
    # a token that begins before the answer is trained with it, unless it is the format's own
    assert label_spans([7, 8, 9], offsets, [(1, 5)]) == [7, 8, 9]
    assert label_spans([7, 8, 9], offsets, [(1, 5)], frozenset([7])) == [-100, 8, 9]
    # one that goes on behind the answer is trained as well, or its last character would not be
    assert label_spans([7, 8, 9], offsets, [(2, 4)]) == [-100, 8, 9]
    assert label_spans([7, 8, 9], offsets, [(0, 1), (3, 5)]) == [7, -100, 9]
