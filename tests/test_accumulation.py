"""Micro-batches of different sizes: every pair, and every token, counts once in its update."""

import json

import pytest
import tiny
import torch
from conftest import write_rows
from peft import PeftModel
from safetensors.torch import load_file
from test_dpo import MODES, plain_log_prob, task_trainers  # noqa: F401  (a fixture)
from torch.nn.functional import logsigmoid

STEPS = ["--precision", "fp32", "--logging_steps", "1", "--num_train_epochs", "1", "--optim", "sgd", "--learning_rate",
         "1", "--max_grad_norm", "0", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]  # fmt: skip


def plain_dpo(model, pairs, beta):
    """The mean loss of all pairs at once, in plain PyTorch."""
    losses = []
    for pair in pairs:
        policy = [plain_log_prob(model, pair, side) for side in ("chosen", "rejected")]
        with torch.no_grad(), model.disable_adapter():
            reference = [plain_log_prob(model, pair, side) for side in ("chosen", "rejected")]
        losses.append(-logsigmoid(beta * (policy[0] - reference[0] - policy[1] + reference[1])))
    return torch.stack(losses).mean()


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def accumulated(trainer, rows, sizes):
    """The summed losses and the gradients of an update in micro-batches of these sizes, as transformers makes it."""
    batches, start = [], 0
    for size in sizes:
        batches.append(trainer.data_collator(rows[start : start + size]))
        start += size
    items, trainer.current_gradient_accumulation_steps = trainer._get_num_items_in_batch(batches, "cpu"), len(batches)
    loss = sum(trainer.training_step(trainer.model, batch, items) for batch in batches)
    return loss, gradients(trainer.model)


@pytest.mark.parametrize("mode", MODES)
def test_pairs_of_a_short_micro_batch_count_as_others_do(task_trainers, mode):  # noqa: F811
    trainer, rows = task_trainers(mode, "lora")
    assert isinstance(trainer.model, PeftModel)
    plain = plain_dpo(trainer.model, rows[:5], trainer.beta)
    plain.backward()
    wanted = gradients(trainer.model)
    trainer.model.zero_grad()
    loss, found = accumulated(trainer, rows, (2, 2, 1))
    torch.testing.assert_close(loss.double(), plain.detach(), rtol=1e-5, atol=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-3


def losses_and_weights(folder):
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry], load_file(folder / "adapter_model.safetensors")


def the_same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5) and one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("task", ["sft", *MODES])
def test_a_run_in_micro_batches_is_the_run_in_batches(train, tmp_path, task):
    """Seven rows, four an update, in batches of 4 and 3, and in micro-batches of 2, 2 and 2, 1."""
    flags, rows = [*STEPS, "--task_type", task], tiny.ROWS[:7]
    if task != "sft":
        flags, rows = ["--train_args_path", "train_args/dpo/base.py", *flags], tiny.PAIRS[:7]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    whole = train(*flags, "--per_device_train_batch_size", "4", data=data, output="whole")
    parts = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    the_same(losses_and_weights(train(*flags, *parts, data=data, output="parts")), losses_and_weights(whole))
