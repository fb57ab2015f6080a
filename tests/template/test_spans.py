"""Where an answer is in a rendering, for templates written for it."""

import re

import pytest

from utils.template.spans import SpanNotFound, find_answer_span

SPECIAL = re.compile(r"<[a-z/]+>")
MESSAGES = [
    {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
    {"role": "user", "content": "R"}, {"role": "assistant", "content": "B"},
]  # fmt: skip


def renderer(opening="<bot>", before="", stop="<end>", last_stop=None, after=""):
    """A template; `before` stands before the last answer alone, `last_stop` ends it."""

    def render(messages, prompt=False):
        text = ""
        for turn, message in enumerate(messages):
            last = turn == len(messages) - 1
            if message["role"] == "user":
                text += f"<user>{message['content']}"
            else:
                thought = before if last else ""
                text += opening + thought + message["content"] + ((last_stop or stop) if last else stop)
        return text + (opening if prompt else after)

    return render


@pytest.mark.parametrize(
    ("render", "answers"),
    [
        (renderer(), ["A<end>", "B<end>"]),
        (renderer(before="<think></think>"), ["A<end>", "<think></think>B<end>"]),
        (renderer(last_stop="<stop>"), ["A<end>", "B<stop>"]),
        (renderer(stop="<end><eot>"), ["A<end><eot>", "B<end><eot>"]),
        (renderer(opening="<bot> "), ["A<end>", "B<end>"]),
        (renderer(before=" "), ["A<end>", "B<end>"]),
        (renderer(after="\n<eos>"), ["A<end>", "B<end>"]),
    ],
)
def test_an_answer_is_from_its_prompt_to_its_stop_token(render, answers):
    text = render(MESSAGES)
    found = [find_answer_span(MESSAGES, turn, text, render, SPECIAL) for turn in (1, 3)]
    assert [text[start:end] for start, end in found] == answers


@pytest.mark.parametrize(
    ("render", "reason"),
    [
        (renderer(stop="."), "no special token ends"),
        (lambda messages, prompt=False: "<x>" if prompt else renderer()(messages), "does not follow the prompt"),
    ],
)
def test_an_answer_without_an_exact_place_is_not_found(render, reason):
    with pytest.raises(SpanNotFound, match=reason):
        find_answer_span(MESSAGES, 3, render(MESSAGES), render, SPECIAL)
