"""A `Template` as a Jinja chat template: the same text, the same trained part, and the same refusals."""

import pytest
import tiny
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from utils.template.format import Template

QUOTES = Template(
    "quotes", "", (), user="'{content}'\\\n", assistant='"\n', stop="<|im_end|>", before_answer="{{",
    after_answer=" %}", after_stop="\n", end="{# end #}", bos="'", default_system="It's 5\\6.", system="{content}\n\n",
)  # fmt: skip
FOLDED = Template(
    "folded", "", (), user="[{content}]", assistant="A:", stop="<|im_end|>", strip=True, alternate=True,
    system_with_user="<{system}>'\n{content}",
)  # fmt: skip


def turns(*texts, system=None):
    roles = ("user", "assistant") * len(texts)
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@pytest.mark.parametrize("template", [QUOTES, FOLDED], ids=lambda template: template.name)
@pytest.mark.parametrize("system", [None, " Be 'brief'.\\ "])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_rendering_is_that_of_the_template(template, system, prompt):
    for messages in (turns("Hi", system=system), turns(" Hi\n", "'Yes'\n", "\\n?", "No.", system=system)):
        found, _ = render_jinja_template(
            [messages], chat_template=template.to_jinja(), add_generation_prompt=prompt, continue_final_message=False
        )
        assert found == [template.render(messages, prompt)]


def test_the_generation_block_is_the_answer_with_its_stop_token():
    rendered, spans = render_jinja_template(
        [turns("Hi", "Yes.", "And?", "No.")], chat_template=QUOTES.to_jinja(), return_assistant_tokens_mask=True
    )
    assert [rendered[0][start:end] for start, end in spans[0]] == ["Yes. %}<|im_end|>", "No. %}<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "tool", "content": "7"}], "no such role: tool"),
        (turns("Hi", "Yes.", system="S") + turns(system="S"), "only at the start"),
        (turns(system="S"), "only at the start"),
        (turns("Hi") + turns("Hi"), "must take turns"),
    ],
)
def test_what_the_format_does_not_support_is_refused(messages, reason):
    with pytest.raises(TemplateError, match=reason):
        render_jinja_template([messages], chat_template=FOLDED.to_jinja())


def test_a_format_without_a_system_turn_refuses_one():
    plain = Template("plain", "", (), user="[{content}]", assistant="A:", stop="<|im_end|>")
    with pytest.raises(TemplateError, match="no such role: system"):
        tiny.byte_level_tokenizer().apply_chat_template(turns("Hi", system="S"), chat_template=plain.to_jinja())
