"""Findings on the tokens of prepared rows."""

from types import SimpleNamespace

import tiny
from datasets import Dataset
from doctor_case import tokenizer_with

from utils.data.report import DataReport
from utils.doctor.tokens import token_findings
from utils.tasks import get_task
from utils.template import get_template


def test_one_bos_is_no_finding(case, report):
    form = get_template("yi").to_jinja()
    spoilt = case.model(lambda: tokenizer_with(bos_token="<|endoftext|>", chat_template="{{ bos_token }}" + form))
    assert report(*case.flags("--template_name", "auto", model=spoilt))[1]["findings"] == []


def test_a_row_that_ends_with_a_call_has_its_stop_token():
    tokenizer = tiny.byte_level_tokenizer()
    ids = tokenizer("Hello<|im_end|>")["input_ids"]
    rows = {"input_ids": [ids], "labels": [ids], "source": [[7]]}
    report = DataReport(files=["rows.jsonl"])
    args = SimpleNamespace(task=get_task("sft"), train_on="all_turns")
    given = Dataset.from_dict(rows), report, args, tokenizer, "<|endoftext|>"
    assert [finding.code for finding in token_findings(*given)] == ["STOP_NOT_TRAINED"]
    assert token_findings(*given, call_stop="<|im_end|>") == []
