"""Findings on settings: learning rates, positions, warm-up, and DeepSpeed's file."""

import math
from types import SimpleNamespace

import pytest
import tiny

from utils.args import parse_args
from utils.doctor import resources
from utils.doctor.examine import quick_findings
from utils.doctor.settings import deepspeed_keys
from utils.model import meta
from utils.tasks import get_task


@pytest.mark.parametrize(
    ("weights", "mode", "rate", "unusual"),
    [
        (4_000_000, "lora", "2e-3", False),
        (7_000_000_000, "lora", "2e-3", True),
        (7_000_000_000, "lora", "2e-4", False),
        (7_000_000_000, "full", "2e-4", True),
        (7_000_000_000, "full", "1e-5", False),
        (7_000_000_000, "lora", "1e-7", True),
    ],
)
def test_usual_learning_rates(case, monkeypatch, weights, mode, rate, unusual):
    size = meta.ModelSize(weights, weights, None, False)
    monkeypatch.setattr("utils.doctor.settings.model_size_or_none", lambda _: size)
    monkeypatch.setattr(resources, "model_size_or_none", lambda _: size)
    flags = case.flags("--train_mode", mode, "--learning_rate", rate, "--num_train_epochs", "3")
    args, train_args = parse_args(flags)
    found = quick_findings(args, train_args, None, None, tiny.byte_level_tokenizer())
    assert ["LEARNING_RATE_UNUSUAL"] * unusual == [finding.code for finding in found]


@pytest.mark.parametrize(
    ("weights", "flags", "many"),
    [
        (4_000_000, [], False),
        (135_000_000, [], True),  # the default suits the embedded model
        (135_000_000, ["--num_train_epochs", "3"], False),
        (135_000_000, ["--max_steps", "100"], False),
    ],
)
def test_many_passes_with_a_model_that_is_not_tiny(case, monkeypatch, weights, flags, many):
    size = meta.ModelSize(weights, weights, None, False)
    monkeypatch.setattr("utils.doctor.settings.model_size_or_none", lambda _: size)
    monkeypatch.setattr(resources, "model_size_or_none", lambda _: size)
    args, train_args = parse_args(case.flags(*flags))
    found = quick_findings(args, train_args, None, None, tiny.byte_level_tokenizer())
    assert ["PASSES_MANY"] * many == [finding.code for finding in found]
    assert not many or "--num_train_epochs 20, and the base has 135,000,000 weights" in found[0].message


@pytest.mark.parametrize(("lengths", "over"), [([3, 10], 0), ([3, 11], 1), ([11, 25], 2)])
def test_a_row_may_be_as_long_as_the_positions(lengths, over, monkeypatch):
    from datasets import Dataset

    from utils.doctor import settings

    monkeypatch.setattr(settings, "model_size_or_none", lambda args: None)
    config = SimpleNamespace(max_position_embeddings=10, rope_parameters=None)
    config.get_text_config = lambda: config
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    data = SimpleNamespace(train=rows.with_format("arrow"), eval=None, eval_report=None)
    found = settings._positions(SimpleNamespace(task=get_task("sft")), config, data)
    wanted = f"{over} rows are longer than the model's 10 positions, the longest {max(lengths)} tokens"
    assert [finding.message[: len(wanted)] for finding in found] == [wanted] * (over > 0)


def test_deepspeed_keys_that_bypass_the_flags():
    config = SimpleNamespace(config={"tensorboard": {"enabled": True}, "activation_checkpointing": {}})
    messages = [finding.message for finding in deepspeed_keys(SimpleNamespace(hf_deepspeed_config=config))]
    assert len(messages) == 2
    assert "--report_to" in messages[0]
    assert "--gradient_checkpointing" in messages[1]
    assert deepspeed_keys(SimpleNamespace(hf_deepspeed_config=None)) == []


def test_a_run_of_one_step_in_warm_up():

    from utils.doctor.settings import _warm_up

    arguments = SimpleNamespace(warmup_steps=0.03, get_warmup_steps=lambda steps: math.ceil(0.03 * steps))
    (finding,) = _warm_up(arguments, 1)
    assert "is 1 step of 1, and the first step of a warm-up has the learning rate 0" in finding.message
    assert _warm_up(arguments, 2) == _warm_up(arguments, 100) == []
