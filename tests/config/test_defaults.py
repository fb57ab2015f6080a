"""Precision, and defaults that depend on other values."""

from parsing import problems_of

import utils.config.defaults
from utils.args import parse_args

DPO = ["--train_args_path", "train_args/dpo/base.py"]


def test_bf16_asked_for_where_there_is_none(parse, monkeypatch):
    monkeypatch.setattr(utils.config.defaults, "device_has_bf16", lambda: False)
    for flags in (["--bf16", "true"], ["--precision", "bf16"]):
        assert "bf16 was requested" in problems_of(parse, *flags)[0]
    args, train_args = parse()
    assert (args.precision, train_args.bf16, train_args.fp16) == ("fp32", False, False)


def test_precision_sets_the_trainers_arithmetic(parse, monkeypatch):
    monkeypatch.setattr(utils.config.defaults, "device_has_bf16", lambda: True)
    assert parse()[1].bf16
    assert not parse("--precision", "fp32")[1].bf16
    assert parse("--bf16", "false")[0].precision == "fp32"


def test_a_smaller_max_len_brings_a_smaller_prompt():
    assert parse_args([*DPO, "--max_len", "300"])[0].max_prompt_length == 150
    assert parse_args([*DPO, "--max_len", "300", "--max_prompt_length", "200"])[0].max_prompt_length == 200
    assert parse_args([*DPO])[0].max_prompt_length == 512
