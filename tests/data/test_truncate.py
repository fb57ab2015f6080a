"""Truncation: the oldest turns first, the same ones whether in advance or one at a time, never an answer."""

import copy
import random

import pytest
import tiny

from utils.data import truncate
from utils.data.report import Dropped
from utils.data.truncate import (
    CUT_OFF,
    Shortened,
    check_all,
    cut_far,
    cut_pair_far,
    encode_pairs_within,
    encode_within,
    first_fit,
    is_far,
    shorter,
)
from utils.runtime.errors import UserError
from utils.template import get_template, template_dict
from utils.template.messages import UNTRAINED_ANSWER, RowNote

TEMPLATES = ["qwen", "llama3", "default", "auto"]


@pytest.fixture(scope="module")
def tokenizers():
    """A tokenizer for each template; `auto` has a form of its own, which drops thinking from all but the last turn."""

    made = {name: tiny.tokenizer_for(template_dict[name], tiny.byte_level_tokenizer) for name in TEMPLATES[:-1]}
    made["auto"] = tiny.byte_level_tokenizer()
    made["auto"].chat_template = get_template("qwen").to_jinja()
    return made


def template_of(name, tokenizer):
    return get_template(name, tokenizer)


def conversation(draw, turns):
    words = ["one", "two", "the fox", "你好", "<|im_end|>", "a\n\nb", "x" * 9, "."]
    said = lambda: " ".join(draw.choices(words, k=draw.randint(1, 12)))  # noqa: E731
    messages = [{"role": "system", "content": said()} for _ in range(draw.choice([0, 1, 1, 2]))]
    for _ in range(turns):
        messages += [{"role": "system", "content": said()}] * (1 if draw.random() < 0.05 else 0)
        messages += [{"role": "user", "content": said()}] * (2 if draw.random() < 0.1 else 1)
        messages += [{"role": "assistant", "content": said()}] * (0 if draw.random() < 0.1 else 1)
    return [*messages, {"role": "user", "content": said()}, {"role": "assistant", "content": said()}]


def one_at_a_time(messages, template, tokenizer, max_len):
    """What is trained of a conversation that loses a turn, is encoded anew, and so on."""
    encoded = template.encode(messages, tokenizer)
    while (surplus := len(encoded["input_ids"]) - max_len) > 0:
        messages = shorter(messages, surplus, tokenizer)
        if messages is None:
            return None
        encoded = template.encode(messages, tokenizer)
    return encoded


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_many_turns_are_dropped_as_one_at_a_time(tokenizers, name):
    tokenizer, draw = tokenizers[name], random.Random(name)
    template = template_of(name, tokenizer)
    cut = 0
    for _ in range(8 if name == "auto" else 25):  # of which one at a time takes seconds a row
        messages = conversation(draw, draw.choice([2, 5, 12, 34]))
        max_len = draw.choice([30, 60, 150, 400])
        kept = cut_far(messages, template, tokenizer, max_len)
        cut += isinstance(kept, Shortened)
        (row,) = encode_within([kept], template, tokenizer, max_len)
        expected = one_at_a_time(messages, template, tokenizer, max_len)
        if expected is None:
            assert isinstance(row, Dropped)
        else:
            assert {name: row[name] for name in ("input_ids", "labels")} == expected
            assert row["shortened"] == (len(template.encode(messages, tokenizer)["input_ids"]) > max_len)
    assert cut > (1 if name == "auto" else 5)


@pytest.mark.parametrize("name", TEMPLATES[:2])
def test_of_pairs_as_well(tokenizers, name):
    tokenizer, draw = tokenizers[name], random.Random(name)
    template = template_of(name, tokenizer)
    cut = 0
    for _ in range(16):
        *prompt, answer = conversation(draw, draw.choice([2, 12, 34]))
        other = [{**answer, "content": "another"}] + draw.choice([[], [prompt[-1], answer]])
        pair = {"prompt": prompt, "chosen": [answer], "rejected": other}
        limits = draw.choice([(60, 40), (200, 150), (400, 60)])
        kept = cut_pair_far(pair, template, tokenizer, *limits)
        cut += kept is not pair
        row, expected = (encode_pairs_within([p], template, tokenizer, *limits)[0] for p in (kept, pair))
        assert row == expected
    assert cut > 5


@pytest.mark.parametrize("name", ["qwen", "auto"])
def test_a_long_conversation_is_rendered_whole_only_once(tokenizers, name, monkeypatch):
    """The work is counted in turns rendered: one after the other, 400 turns are 160,000 of them and more."""
    tokenizer = tokenizers[name]
    template = template_of(name, tokenizer)
    roles = ("user", "assistant")
    messages = [{"role": role, "content": f"Number {i}, said once."} for i in range(400) for role in roles]
    rendered = []
    original = type(template).render
    monkeypatch.setattr(
        type(template), "render", lambda self, rows, *more, **options: (
            rendered.append(len(rows)), original(self, rows, *more, **options))[1],
    )  # fmt: skip
    kept = cut_far(messages, template, tokenizer, 512)
    template.check(kept)
    (row,) = encode_within([kept], template, tokenizer, 512)
    assert 450 < len(row["input_ids"]) <= 512 and row["shortened"]
    assert sum(rendered) < 4 * len(messages) + 4 * len(kept) ** 2


@pytest.mark.parametrize("train_on", ["all_turns", "last_turn"])
@pytest.mark.parametrize("surplus", [5, 10_000])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_start_is_found_in_a_few_tokenisations(tokenizers, name, surplus, train_on, monkeypatch):
    """By halving alone it would take ten tokenisations of 400 turns."""
    tokenizer = tokenizers[name]
    template = template_of(name, tokenizer)
    roles = ("user", "assistant")
    messages = [{"role": role, "content": f"Number {i}, once."} for i in range(400) for role in roles]
    max_len = len(template.encode(messages, tokenizer)["input_ids"]) - surplus
    texts = []
    original = truncate.encode_texts
    monkeypatch.setattr(truncate, "encode_texts", lambda some, *more: (texts.extend(some), original(some, *more))[1])
    kept = cut_far(messages, template, tokenizer, max_len)
    assert len(texts) <= 6 and isinstance(kept, Shortened)
    (row,) = encode_within([kept], template, tokenizer, max_len, train_on=train_on)
    assert max_len - 60 < len(row["input_ids"]) <= max_len


def test_turns_of_very_different_lengths_take_no_more_than_halving():
    """Interpolation alone would try the starts one by one."""
    sizes = []
    messages = [{"role": role, "content": "Hi"} for _ in range(400) for role in ("user", "assistant")]
    messages[0]["content"] = "word " * 100_000
    messages[-2]["content"] = "word " * 500

    def surplus(rest):
        sizes.append(len(rest))
        return sum(len(message["content"]) for message in rest) - 2600 - 3 * 700

    kept = first_fit(messages, surplus)
    assert surplus(kept) <= 0 < surplus(messages[len(messages) - len(kept) - 2 :])
    assert len(sizes) < 3 * 9 + 3


def test_the_system_message_and_its_tools_stay(tokenizers):
    system = {"role": "system", "content": "Be kind.", "tools": [{"name": "f"}]}
    messages = [system, *conversation(random.Random(1), 40)[-60:]]
    kept = cut_far(messages, template_of("auto", tokenizers["auto"]), tokenizers["auto"], 100)
    assert kept[0] == system and isinstance(kept, Shortened) and len(kept) < 40
    messages = [{**messages[2], "tools": [{"name": "f"}]}, *messages[3:]]
    kept = cut_far(messages, template_of("qwen", tokenizers["qwen"]), tokenizers["qwen"], 100)
    assert not isinstance(kept, Shortened)  # the template has no form for tools, which its check says


def said(*texts):
    """`said("system: Be kind.", "user: Hi")` → messages"""
    return [dict(zip(("role", "content"), text.split(": ", 1), strict=True)) for text in texts]


LONG = "x " * 200
LATER = {
    "two at the start": (
        ["system: FIRST", "system: SECOND", f"user: {LONG}", "assistant: a", "user: q", "assistant: b"],
        ["system: FIRST", "system: SECOND", "user: q", "assistant: b"],
    ),
    "one in between": (
        ["user: p", f"assistant: {LONG}", "system: MID", "user: q", "assistant: b"],
        ["system: MID", "user: q", "assistant: b"],
    ),
    "one at each place": (
        ["system: A", "user: p", f"assistant: {LONG}", "system: B", f"user: {LONG}", "assistant: a", "user: q",
         "system: C", "assistant: b"],
        ["system: A", "system: B", "user: q", "system: C", "assistant: b"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
@pytest.mark.parametrize("name", ["qwen", "llama3", "auto"])
def test_every_system_message_stays(tokenizers, name, case):
    tokenizer = tokenizers[name]
    template = template_of(name, tokenizer)
    messages, expected = (said(*texts) for texts in LATER[case])
    for conversation in (messages, cut_far(messages, template, tokenizer, 90)):
        (row,) = encode_within([conversation], template, tokenizer, 90)
        assert row["shortened"] and row["input_ids"] == template.encode(expected, tokenizer)["input_ids"]
    asked = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": said("assistant: c")}
    for pair in (asked, cut_pair_far(asked, template, tokenizer, 120, 90)):
        (row,) = encode_pairs_within([pair], template, tokenizer, 120, 90)
        whole = template.encode(expected, tokenizer)["input_ids"]
        assert whole[: len(row["prompt_ids"])] == row["prompt_ids"] and row["shortened"]


def test_a_system_message_with_no_other_place_stops_the_cut(tokenizers):
    """A format that takes a system message anywhere but before a question that opens the conversation."""
    tokenizer = tokenizers["qwen"]
    tokenizer = copy.deepcopy(tokenizer)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message at the start') }}{% endif %}"
    tokenizer.chat_template = refusal + get_template("qwen").to_jinja()
    template = get_template("auto", tokenizer)
    messages = said(*LATER["one in between"][0])
    template.check(messages)
    for conversation in (messages, cut_far(messages, template, tokenizer, 90)):
        (row,) = encode_within([conversation], template, tokenizer, 90)
        assert "has a system message among the turns to drop" in row.reason
    pair = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": said("assistant: c")}
    (row,) = encode_pairs_within([pair], template, tokenizer, 120, 90)
    assert "has a system message among the turns to drop" in row.reason


def test_what_is_wrong_is_told_by_the_turns_of_the_row(tokenizers):
    template = template_of("llama3", tokenizers["llama3"])
    messages = conversation(random.Random(1), 10)
    messages[-1] = {"role": "assistant", "content": "x", "tool_calls": [{}]}
    with pytest.raises(UserError, match=f"turn {len(messages)} "):
        check_all(template, messages[-4:], messages)


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris is."},
    {"role": "user", "content": "The quick brown fox"},
    {"role": "assistant", "content": "jumps over"},
]


def fit(messages, max_len, tokenizer):
    return encode_within([messages], get_template("qwen", tokenizer), tokenizer, max_len)[0]


def test_the_oldest_turns_go_first(tokenizer):
    template = get_template("qwen", tokenizer)
    shorter = template.encode([TURNS[0], *TURNS[3:]], tokenizer)
    whole = template.encode(TURNS, tokenizer)
    answers = {"answers": (2, 0)}
    assert fit(TURNS, len(whole["input_ids"]), tokenizer) == {**whole, "shortened": False, "notes": [], **answers}
    cut_off = [RowNote(UNTRAINED_ANSWER, CUT_OFF)]
    for max_len in (len(whole["input_ids"]) - 1, len(shorter["input_ids"])):
        assert fit(TURNS, max_len, tokenizer) == {**shorter, "shortened": True, "notes": cut_off, **answers}


def test_tools_stay_with_a_conversation_that_loses_its_first_turn():
    from utils.data.truncate import shorter

    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    tools = [{"name": "look"}]
    assert shorter([{**turns[0], "tools": tools}, *turns[1:]], 1, None) == [{**turns[2], "tools": tools}, turns[3]]
    system = {"role": "system", "content": "Be brief.", "tools": tools}
    assert shorter([system, *turns], 1, None) == [system, *turns[2:]]


def test_a_row_without_a_label_is_dropped():
    """As a template's marks can leave one: it would only take time, and a step of such rows has no loss."""
    from utils.data.report import Dropped
    from utils.data.truncate import encode_within

    class Unmarked:
        def encode_batch(self, conversations, tokenizer):
            return [{"input_ids": [1, 2, 3], "labels": labels} for labels in ([-100] * 3, [-100, -100, 3])]

        def notes(self, messages, train_on):
            return []

    first, second = encode_within([[], []], Unmarked(), None, max_len=8)
    assert first == Dropped("has nothing to train") and second["labels"] == [-100, -100, 3]


def test_then_the_beginning_of_the_last_question(tokenizer):
    template = get_template("qwen", tokenizer)
    smallest = template.encode([TURNS[0], *TURNS[3:]], tokenizer)
    cut = fit(TURNS, len(smallest["input_ids"]) - 3, tokenizer)
    text = tokenizer.decode(cut["input_ids"])
    assert len(cut["input_ids"]) <= len(smallest["input_ids"]) - 3
    assert " fox<|im_end|>" in text and "The quick" not in text and "Be brief." in text
    assert tokenizer.decode([label for label in cut["labels"] if label != -100]) == "jumps over<|im_end|>"


def test_an_answer_is_never_cut(tokenizer):
    dropped = fit([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no " * 100}], 60, tokenizer)
    assert dropped.kind == "too long" and "--max_len 60" in dropped.reason


def test_a_first_answer_is_not_cut(tokenizer):
    messages = [{"role": "assistant", "content": "no " * 50}, {"role": "assistant", "content": "yes"}]
    assert "too long" in fit(messages, 40, tokenizer)


@pytest.mark.parametrize("more", [
    {"tools": [{"type": "function", "function": {"name": "f", "description": "d" * 500}}]},
    {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"text": "a" * 500}}}]},
    {"reasoning_content": "r" * 500},
])  # fmt: skip
def test_tools_calls_and_reasoning_count_for_what_is_far_too_long(more):
    turns = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}] * 2
    assert not is_far(turns, 100)
    assert is_far([turns[0], {**turns[1], **more}, *turns[2:]], 100)
