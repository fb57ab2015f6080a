"""A source's own system message and template arguments, compared with transformers' `apply_chat_template`."""

from types import SimpleNamespace

import pytest

from utils.runtime.errors import UserError
from utils.template import get_template
from utils.template.auto import AutoTemplate
from utils.template.with_source import with_source_settings

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
JINJA = (
    "{% if shout is defined and shout %}<!>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def source(system=None, **arguments):
    return SimpleNamespace(name="s", system=system, template_args=arguments)


@pytest.fixture
def auto(tokenizer):
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path) if tokenizer.name_or_path else tokenizer
    before, tokenizer.chat_template = tokenizer.chat_template, JINJA
    yield AutoTemplate.of(tokenizer), tokenizer
    tokenizer.chat_template = before


@pytest.mark.parametrize("name", ["qwen", "llama2", "llama3.1", "deepseek-v3", "gpt-oss"])
def test_a_named_format_has_the_system_message_where_the_row_has_none(name):
    plain = get_template(name)
    changed = with_source_settings(plain, source("Be brief."))
    assert changed.render(TURNS) == plain.render(SYSTEM + TURNS) != plain.render(TURNS)
    other = [{"role": "system", "content": "Own."}]
    assert changed.render(other + TURNS) == plain.render(other + TURNS)
    assert changed.key != plain.key


def test_auto_has_the_system_message_and_the_arguments(auto):
    template, tokenizer = auto
    changed = with_source_settings(template, source("Be brief.", shout=True))
    assert changed.render(TURNS) == tokenizer.apply_chat_template(SYSTEM + TURNS, tokenize=False, shout=True)
    other = [{"role": "system", "content": "Own."}]
    assert changed.render(other + TURNS) == tokenizer.apply_chat_template(other + TURNS, tokenize=False, shout=True)
    assert with_source_settings(template, source(shout=False)).render(TURNS) == template.render(TURNS)
    encoded = changed.encode(TURNS, tokenizer)
    assert tokenizer.decode(encoded["input_ids"]) == changed.render(TURNS)
    assert tokenizer.decode([label for label in encoded["labels"] if label != -100]) == "Hello<|im_end|>"
    assert changed.key != template.key


def test_what_the_template_does_not_take_is_refused(auto):
    for template, settings in (
        (get_template("qwen"), source(enable_thinking=False)),
        (get_template("gemma"), source("Be brief.")),
        (auto[0], source(enable_thinking=False)),
        (auto[0], source(messages=[])),
    ):
        with pytest.raises(UserError):
            with_source_settings(template, settings)


def test_without_settings_it_is_the_template_itself():
    template = get_template("qwen")
    assert with_source_settings(template, source()) is template and with_source_settings(None, source("x")) is None


TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("name", ["qwen3", "llama3.1", "deepseek-v3", "gpt-oss"])
def test_tools_are_rendered_beside_the_system_message(name):
    template = get_template(name)
    changed = with_source_settings(template, source("Be brief."))
    expected = template.render([{**SYSTEM[0], "tools": TOOLS}, *TURNS])
    assert changed.render([{**TURNS[0], "tools": TOOLS}, TURNS[1]]) == expected
