"""Findings on the tokens of prepared rows."""

from doctor_case import tokenizer_with

from utils.template import get_template


def test_one_bos_is_no_finding(case, report):
    form = get_template("yi").to_jinja()
    spoilt = case.model(lambda: tokenizer_with(bos_token="<|endoftext|>", chat_template="{{ bos_token }}" + form))
    assert report(*case.flags("--template_name", "auto", model=spoilt))[1]["findings"] == []
