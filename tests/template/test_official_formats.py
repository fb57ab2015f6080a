"""Registered formats against the official templates that TRL ships, over tools, reasoning and unusual conversations."""

import re

import pytest
from test_catalogue import DATE, IN_TRL, official_rendering
from test_catalogue import FAMILIES as NAMES
from test_jinja_template import CASES as TOOL_CASES
from test_jinja_template import REASONING, SYSTEM
from test_jinja_template import REFUSED as TOOLS_REFUSED
from test_official import CASES, answer, tokenizer_of, trained_texts, user

from utils.runtime.errors import UserError
from utils.template import get_template
from utils.template.messages import UNTRAINED_ANSWER

FAMILIES = sorted(set(IN_TRL) - {"llama3_1", "deepseekv3", "gptoss"})  # test_jinja_template.py has these
TALKS = {
    **CASES,
    **TOOL_CASES,
    **REASONING,
    "spaces around all": [{**SYSTEM, "content": " S \n"}, user("\n Q "), answer(" A\n\n"), user("Q2\n")],
    "an empty system message": [{**SYSTEM, "content": ""}, user("Q-ONE?"), answer("A-ONE.")],
    "reasoning in one turn": [user("Q-ONE?"), answer("A-ONE.", reasoning_content="T-ONE.\n\nx")],
    "empty reasoning": [user("Q-ONE?"), answer("A-ONE.", reasoning_content="")],
    "an empty block": [user("Q"), answer("<think>\n\n</think>\n\nA-ONE."), user("Q2")],
    "a result as a question": [user("Q"), answer("A"), user("<tool_response>x</tool_response>"), answer("B")],
    "two questions in a row": [user("Q"), user("Q2"), answer("A")],
    "two answers in a row": [user("Q"), answer("A"), answer("B")],
    "other scripts": [user("Wo? 在哪 \u200b"), answer("Ça 好🙂")],
}
_LATER_SYSTEM = {"two systems", "a later system message"}
# conversations that a format refuses although the official template renders them
REFUSED = {
    "llama3.2": {"call and text", *TOOLS_REFUSED["llama3.1"]},
    "gemma-3": {"two systems", "a later system message"},
    "gemma-4": {"two answers in a row"},
    "deepseek-r1": _LATER_SYSTEM,
}
# DeepSeek-R1's official template leaves out all reasoning; here the last answer keeps it
SHOWS_MORE = {"deepseek-r1": {"thoughts", "thoughts in content", "reasoning", "reasoning in one turn"}}
_BLOCK = re.compile(r"^(<think>)?\n{0,2}</think>\n{0,2}")  # an empty one, set by the official template


def has_tools(messages):
    return any(message.get(key) for message in messages for key in ("tools", "tool_calls", "tool_call_id"))


def official(family, messages, prompt):
    tools = messages[0].get("tools")
    bare = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
    try:
        return official_rendering(family, bare, prompt, tools)
    except Exception:  # the template's own, or whatever its code runs into
        return None


def rendering(template, messages, prompt):
    try:
        template.check(messages)
        return template.render(messages, prompt)
    except UserError:
        return None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_conversation_is_rendered_as_officially_or_refused(family):
    name = NAMES[family]
    template = get_template(name, date=DATE)
    for case, messages in TALKS.items():
        reasons = any("reasoning_content" in message for message in messages)
        for prompt in (False, True):
            ours, theirs = rendering(template, messages, prompt), official(family, messages, prompt)
            if ours is None:
                unsupported = (has_tools(messages) and not template.has_tools) or (reasons and theirs is not None)
                assert theirs is None or unsupported or case in REFUSED.get(name, ()), (case, theirs)
            elif case in SHOWS_MORE.get(name, ()):
                assert ours == theirs or "</think>" in ours, case
            else:
                assert ours == theirs, case


@pytest.mark.parametrize("name", ["qwen3-hybrid", "qwen3.5", "qwen3.6", "glm-4.5", "lfm2.5", "nemotron-3", "gemma-4"])
def test_reasoning_is_rendered(name):
    """So that the test above does not pass because all of it is refused."""
    text = rendering(get_template(name), TALKS["reasoning in one turn"], False)
    assert "T-ONE.\n\nx" in text


@pytest.mark.parametrize("name", ["qwen3-hybrid", "qwen3.5", "qwen3.6", "glm-4.5", "lfm2", "lfm2.5", "nemotron-3",
                                  "nemotron-3-ultra", "llama3.2"])  # fmt: skip
def test_tools_are_rendered(name):
    template = get_template(name, date=DATE)
    assert all(rendering(template, TOOL_CASES[case], False) for case in ("no call", "one call", "call last"))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "glm4moe"])
def test_trained_is_what_auto_finds_in_the_official_template(family):
    """`auto` locates answers by rendering parts of a conversation, without marks; an empty block is never trained."""
    tokenizer = tokenizer_of(family)
    for token in ("[INST]", "[/INST]"):
        tokenizer.add_tokens(token)
    auto = get_template("auto", tokenizer, DATE)
    template = get_template(NAMES[family], tokenizer, DATE)
    for case in ("single", "multi", "system", "call", "two calls", "thoughts and call", "spaces", "empty answer"):
        messages = TALKS[case]
        if rendering(template, messages, False) is None or (case == "spaces" and "nemotron" in family):
            continue
        found = [trained_texts(each.encode(messages, tokenizer), tokenizer) for each in (template, auto)]
        ours, theirs = [[_BLOCK.sub("", text).strip() for text in texts] for texts in found]
        assert ours == theirs, case
        assert not any(_BLOCK.match(text) for text in found[0]), case


@pytest.mark.parametrize(("name", "texts"), [
    ("qwen3-hybrid", ["<think>\nT-TWO.\n</think>\n\nA-TWO.<|im_end|>"]),
    ("qwen3.5", ["T-TWO.\n</think>\n\nA-TWO.<|im_end|>"]),
    ("qwen3.5-small", ["T-TWO.\n</think>\n\nA-TWO.<|im_end|>"]),
    ("deepseek-r1", ["T-TWO.\n</think>\n\nA-TWO.<｜end▁of▁sentence｜>"]),
    ("glm-4.5", ["\n<think>T-TWO.</think>\nA-TWO.<|user|>"]),
    ("lfm2.5", ["<think>T-TWO.</think>A-TWO.<|im_end|>"]),
    ("nemotron-3", ["T-TWO.\n</think>\nA-TWO.<|im_end|>"]),
    ("nemotron-3-ultra", ["T-TWO.</think>A-TWO.<|im_end|>"]),
    ("gemma-4", ["<|channel>thought\nT-TWO.\n<channel|>A-TWO.<turn|>"]),
    ("smollm3", ["<think>\nT-ONE.\n</think>\nA-ONE.<|im_end|>", "<think>\nT-TWO.\n</think>\nA-TWO.<|im_end|>"]),
])  # fmt: skip
def test_reasoning_is_trained_where_it_is_shown(name, texts):
    """Trained is what follows the prompt; an earlier answer whose reasoning is not shown is not trained, but noted."""
    family = next((family for family in FAMILIES if NAMES[family] == name), "qwen3")
    tokenizer = tokenizer_of(family)
    template = get_template(name, tokenizer, DATE)
    messages = REASONING["reasoning"]
    assert trained_texts(template.encode(messages, tokenizer), tokenizer) == texts
    untrained = [note for note in template.notes(messages) if note.kind == UNTRAINED_ANSWER]
    assert len(untrained) == 2 - len(texts)
    prompt = template.render(messages[:-1], True)
    assert template.render(messages).startswith(prompt.removesuffix("\n")) or name == "qwen3.5-small"


def test_an_answer_of_glm_ends_with_the_token_that_opens_the_next_turn():
    tokenizer = tokenizer_of("glm4moe")
    template = get_template("glm-4.5", tokenizer)
    encoded = template.encode(TALKS["call"], tokenizer)
    texts = trained_texts(encoded, tokenizer)
    assert [text[-16:] for text in texts] == ["/tool_call><|observation|>"[-16:], "\nA-ONE.<|user|>"[-16:],
                                              "\nA-TWO.<|user|>"[-16:]]  # fmt: skip
    # the official rendering, and the token that ends the last answer
    assert tokenizer.decode(encoded["input_ids"]) == official("glm4moe", TALKS["call"], False) + "<|user|>"


def test_a_system_message_before_a_later_question_leaves_earlier_answers_untrained():
    """In mistral-v3 it precedes the last question, so that an earlier one was answered with another prompt."""
    tokenizer = tokenizer_of("llava_next")
    template = get_template("mistral-v3-tekken", tokenizer)
    talk = [SYSTEM, user("Q-ONE?"), answer("A-ONE."), user("Q-TWO?"), answer("A-TWO.")]
    assert template.render(talk) == "<s>[INST]Q-ONE?[/INST]A-ONE.</s>[INST]SYSTEM.\n\nQ-TWO?[/INST]A-TWO.</s>"
    assert trained_texts(template.encode(talk, tokenizer), tokenizer) == ["A-TWO.</s>"]
    assert [note.kind for note in template.notes(talk)] == [UNTRAINED_ANSWER]
    assert len(trained_texts(template.encode(talk[1:], tokenizer), tokenizer)) == 2


def test_the_date_of_llama3_2_is_the_days():
    plain, tools = TALKS["single"], TOOL_CASES["no call"]
    for messages in (plain, tools):
        assert "Today Date: 31 Jan 2026\n" in get_template("llama3.2", date="2026-01-31").render(messages)
