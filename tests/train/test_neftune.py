"""NEFTune's noise: a row has as much of it end to end, padded and packed, by the paper's formula."""

import math

import pytest
import tiny
import torch
from conftest import write_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from utils.data.collate import build_collator
from utils.train.neftune import add_noise, row_lengths

ALPHA, WIDTH = 5.0, 64
ROWS = [[5, 6, 7], list(range(20, 60)), [8, 9, 10, 11, 12, 13, 14]]


def batch_of(form):
    if form == "packed":
        rows = [{"input_ids": sum(ROWS, []), "labels": sum(ROWS, []), "seq_lengths": [len(row) for row in ROWS]}]
    else:
        rows = [{"input_ids": row, "labels": row} for row in ROWS]
    batch = build_collator(0, padding_free=form != "padded")(rows)
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def bounds_of(form):
    """alpha / √(L d) of each token, written out."""
    of_row = [ALPHA / math.sqrt(len(row) * WIDTH) for row in ROWS]
    if form != "padded":
        return torch.tensor([[bound for bound, row in zip(of_row, ROWS, strict=True) for _ in row]])
    return torch.tensor([[bound] * len(row) + [0] * (40 - len(row)) for bound, row in zip(of_row, ROWS, strict=True)])


class Trainer:
    def __init__(self, model):
        self.model, self.neftune_noise_alpha = model, ALPHA


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("form", ["end_to_end", "padded", "packed"])
def test_the_noise_is_the_papers_for_each_row_by_itself(form, adapter, tiny_models):
    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    embedding = model.get_input_embeddings()
    trainer, seen = Trainer(model), []
    add_noise(trainer)
    assert trainer.neftune_noise_alpha is None  # transformers adds none of its own
    embedding.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    batch = batch_of(form)
    torch.manual_seed(3)
    model.train()(**batch)
    torch.manual_seed(3)
    clean = torch.nn.functional.embedding(batch["input_ids"], embedding.weight)
    expected = clean + torch.empty_like(clean).uniform_(-1, 1) * bounds_of(form)[..., None]
    torch.testing.assert_close(seen[0], expected.detach())
    model.eval()(**batch)
    torch.testing.assert_close(seen[1], clean.detach())


def test_lengths_of_rows():
    positions, mask = torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert row_lengths((1, 5), None, positions).tolist() == [[3, 3, 3, 2, 2]]
    assert row_lengths((2, 3), mask, None).tolist() == [[3, 3, 3], [2, 2, 0]]
    assert row_lengths((1, 4), None, None).tolist() == [[4, 4, 4, 4]]
    padded = torch.tensor([[0, 1, 0, 0]]), torch.tensor([[1, 1, 1, 0]])  # two rows, then padding
    assert row_lengths((1, 4), padded[1], padded[0]).tolist() == [[2, 2, 1, 0]]


@pytest.mark.parametrize("task", ["sft", "dpo_multi", "dpo_single"])
@pytest.mark.parametrize("form", ["true", "false"])
def test_a_run_has_that_noise_and_no_other(task, form, train, tmp_path, monkeypatch):
    """Measured on the way through a whole run: uniform, with the spread that each row's length gives."""
    import utils.train.trainer

    seen, prepare = [], utils.train.trainer.prepare_trainer

    def watch(trainer, *rest):
        prepare(trainer, *rest)
        look = {}
        trainer.model.register_forward_pre_hook(lambda m, a, kwargs: look.update(kwargs), with_kwargs=True)

        def note(module, args, output):
            if module.training:
                clean = torch.nn.functional.embedding(args[0], module.weight)
                seen.append((look.get("attention_mask"), look.get("position_ids"), (output - clean).detach()))

        trainer.model.get_input_embeddings().register_forward_hook(note)

    monkeypatch.setattr(utils.train.trainer, "prepare_trainer", watch)
    kind = task.split("_")[0]
    data = write_rows(tmp_path / "data.jsonl", {"sft": tiny.ROWS, "dpo": tiny.PAIRS}[kind])
    flags = ["--train_args_path", f"train_args/{kind}/base.py", "--task_type", task, "--neftune_noise_alpha", "5"]
    if task != "dpo_multi":
        flags += ["--padding_free", form]
    train(*flags, "--precision", "fp32", "--max_steps", "2", "--train_special_tokens", "off", data=data)
    assert seen
    for mask, positions, noise in seen:
        rows = []
        if positions is not None and positions.shape == noise.shape[:2]:
            starts = [*torch.nonzero(positions[0] == 0).flatten().tolist(), positions.shape[1]]
            rows = [noise[0, start:end] for start, end in zip(starts, starts[1:], strict=False)]
        else:
            rows = [line[mark.bool()] for line, mark in zip(noise, mask, strict=True)]
        for row in rows:
            bound = 5 / math.sqrt(row.numel())  # L · d numbers
            assert row.abs().max() <= bound * 1.0001
            assert row.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.12)
