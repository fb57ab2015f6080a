"""A long conversation read in parts is read as it is read whole, on the official template of every family."""

import json
import random

import pytest
from test_official import NAMES, RESULT, TOOLS, answer, calls, tokenizer_of, user

from utils.runtime.errors import UserError
from utils.template import get_template
from utils.template.auto import AutoTemplate
from utils.template.reading import read_as_form, read_at_once, read_conversation, read_in_parts

ALL = ("gptoss", "qwen3", "qwen3_5")  # with calls and thoughts as well, which take longer


def plain(draw, turns):
    said = lambda: " ".join(draw.choices(["one", "two", "你好", "x\ny", "<b>", "A."], k=draw.randint(1, 6)))  # noqa: E731
    messages = [{"role": "system", "content": said()}] if draw.random() < 0.5 else []
    for _ in range(turns):
        messages += [user(said()), answer(said(), **({"train": False} if draw.random() < 0.1 else {}))]
    return messages


def with_calls(draw, turns):
    messages = plain(draw, turns)
    first, *others = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for place in sorted(draw.sample(others, 6), reverse=True):
        call = answer("", tool_calls=calls({"people": draw.randint(1, 9)}))
        messages[place + 1 : place + 1] = [call, RESULT]
    return [{**messages[0], "tools": TOOLS}, *messages[1:]]


def with_thoughts(draw, turns):
    messages = plain(draw, turns)
    return [
        {**m, "reasoning_content": "So it is."} if m["role"] == "assistant" and draw.random() < 0.5 else m
        for m in messages
    ]


def both(template, messages):
    """The reading in parts and that of the whole, the notes in any order."""
    try:
        whole = read_at_once(template, messages)
    except UserError:
        whole = None
    parts = read_in_parts(template, messages, read_at_once)
    if parts is not None:
        assert whole is not None and whole.refused is None
        assert (parts.text, parts.spans) == (whole.text, whole.spans)
        assert sorted(parts.notes) == sorted(whole.notes)
    return parts, whole


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_read_as_the_whole(name):
    tokenizer, draw = tokenizer_of(name), random.Random(name)
    try:
        template = get_template("auto", tokenizer)
    except UserError:
        return  # has no exact mask at all
    read = 0
    for make in (plain, with_calls, with_thoughts) if name in ALL else (plain,):
        parts, _ = both(template, make(draw, 26))
        read += parts is not None
    assert read >= (2 if name in ALL else 1)


def test_the_work_grows_with_the_length_alone():
    """Counted in turns rendered; read whole, 400 turns are more than 160,000."""
    template = get_template("auto", tokenizer_of("qwen3"))
    counts = []
    for turns in (100, 200, 400):
        rendered = []

        class Counted:
            def __getattr__(self, name):
                return getattr(template, name)

            def render(self, messages, prompt=False):
                rendered.append(len(messages))  # noqa: B023
                return template.render(messages, prompt)

        reading = read_in_parts(Counted(), plain(random.Random(turns), turns), read_at_once)
        assert len(reading.spans) > 0.8 * turns
        counts.append(sum(rendered))
    assert counts[2] < 2.3 * counts[1] < 5 * counts[0]


LAST = (  # tools stand before the last question, wherever that is
    "{% for m in messages %}{% if loop.revindex == 2 and tools %}[TOOLS]{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FIRST = (  # the first question is shown otherwise than any other
    "{% for m in messages %}{% if loop.first %}<b>{% endif %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
COUNTED = FIRST.replace("{% if loop.first %}<b>", "{% if m.role == 'user' %}{{ loop.index }}")


@pytest.mark.parametrize(("form", "in_parts"), [(LAST, False), (FIRST, True), (COUNTED, False)])
def test_a_template_that_shows_a_part_otherwise_is_read_whole(form, in_parts):
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = form
    template = get_template("auto", tokenizer)
    messages = plain(random.Random(1), 30)
    messages = [{**messages[0], "tools": TOOLS}, *messages[1:]] if form is LAST else messages
    parts, _ = both(template, messages)
    assert (parts is not None) == in_parts


ODD = [
    *["one", "two words", "A, b."] * 5,
    " two",
    "x\ny\n",
    "你好",
    "user",
    "A.",
    "<think>why</think>so",
    "[INST]",
    "i",
    "  ",
    "assistant 0",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_derived_form_locates_what_the_template_itself_shows(name):
    """Whatever a content looks like, the form reads what the renderings of all prompts say, or it is not used."""
    draw = random.Random(name)
    try:
        template = get_template("auto", tokenizer_of(name))
    except UserError:
        return
    used = 0
    for _ in range(60 if template.form else 0):
        messages = [{"role": "system", "content": draw.choice(ODD)}] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 4)):
            messages += [user(draw.choice(ODD)), answer(draw.choice(ODD))]
            messages[-1] |= draw.choice([{}, {}, {"train": False}, {"train": 0.5}, {"extra": {"note": "x"}}])
        messages += [user("last")] * draw.choice([0, 0, 1])
        try:
            reading = read_as_form(template, messages)
        except UserError:
            continue
        if reading is not None:
            used += 1
            assert reading == read_at_once(template, messages)
    assert used > 1 or not template.form


SEARCHING = (  # the last question that is no result of a tool, as Qwen3.5's template does
    "{% set ns = namespace(none=true) %}{% for m in messages %}{% if m.role == 'user' and not"
    " m.content.startswith('<tool_response>') %}{% set ns.none = false %}{% endif %}{% endfor %}"
    "{% if ns.none %}{{ raise_exception('no question') }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_question_with_a_tag_of_the_template_is_read_with_care():
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = SEARCHING
    template = get_template("auto", tokenizer)
    for question in ("<tool_response>a</tool_response>", "<|im_start|>"):
        messages = [user(question), answer("one"), user("two"), answer("three")]
        assert read_as_form(template, messages) is None
    assert read_as_form(template, [user("<b>x</b> [0]"), answer("one")]) is not None
    messages = [user("<tool_response>a</tool_response>"), answer("one"), user("two"), answer("three")]
    reading = read_conversation(template, json.dumps(messages))
    assert [reading.text[start:end] for start, end in reading.spans] == ["three<|im_end|>"]


def test_a_plain_conversation_takes_one_rendering(monkeypatch):
    """Locating its answers in renderings of every prompt would take three for each answer."""
    template = get_template("auto", tokenizer_of("qwen2_5"))
    assert template.form
    rendered = []
    original = AutoTemplate.render_with_marks
    monkeypatch.setattr(
        AutoTemplate, "render_with_marks", lambda *given: (rendered.append(1), original(*given))[1]
    )  # fmt: skip
    messages = plain(random.Random(3), 5)
    template.check(messages)
    assert len(rendered) == 1
    template.check([*messages[:-1], {**messages[-1], "name": "Ann"}])
    assert len(rendered) > 10
