"""Findings on the chat template."""

import re
from types import SimpleNamespace

from doctor_case import tokenizer_with

from utils.template import get_template


def test_a_different_format_names_the_flag_for_the_tokenizers_own(case, report):
    """A registered one by its name, any other as auto; as the remedy alone."""
    for form, name in ((get_template("yi").to_jinja(), "qwen3"), (_ODD, "auto")):
        model = case.model(lambda form=form: tokenizer_with(chat_template=form))
        findings = report(*case.flags(model=model))[1]["findings"]
        (finding,) = (finding for finding in findings if finding["code"] == "TEMPLATE_DIFFERS")
        assert f"Give --template_name {name} " in finding["remedy"] and "--template_name" not in finding["message"]


def test_a_format_that_cannot_be_trained_exactly_names_the_flag_to_keep(tokenizer, monkeypatch):
    from utils.doctor import template as checks
    from utils.runtime.errors import UserError

    def refused(*_):
        raise UserError("no exact mask")

    monkeypatch.setattr(checks, "template_in", lambda tokenizer: None)
    monkeypatch.setattr(checks.AutoTemplate, "of", refused)
    assert "Keep --template_name qwen" in checks._flag_for(get_template("qwen"), tokenizer)


# ChatML with another opening
_ODD = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}:\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}"
)


def test_a_prompt_whose_last_token_merges_with_the_answer():
    """As Qwen3.6: the prompt ends with `<think>\\n`, and in a row two line feeds are one token."""

    from utils.doctor.template import _prompt

    def render(messages, add_generation_prompt=False):
        return "Q<think>\n" if add_generation_prompt else f"Q<think>\n{after}</think>Hello!"

    template = SimpleNamespace(prompt_only_suffix=lambda: "", render=render)
    ids = {"Q": 1, "<think>": 2, "\n\n": 3, "\n": 4, "</think>": 5, "Hello!": 6}
    texts = {number: text for text, number in ids.items()}

    def tokenizer(text, **_):
        return {"input_ids": [ids[part] for part in re.findall("|".join(ids), text)]}

    tokenizer.decode = lambda numbers: "".join(map(texts.get, numbers))
    after = ""
    assert _prompt(template, tokenizer) == []
    after = "\n"
    (finding,) = _prompt(template, tokenizer)
    assert finding.code == "PROMPT_NOT_FOLLOWED" and r"another token in a row, '\n\n</think>'" in finding.message
