"""The loss stays the loss: padded, padding-free, packed, accumulated; against cross-entropy over whole logits."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from utils.data.collate import build_collator
from utils.patches.attention import use_row_attention
from utils.patches.lm_head import use_trained_positions

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10, 11], "labels": [-100, -100, -100, 8, 9, 10, 11]},
    {"input_ids": [12, 13, 14], "labels": [-100, 13, 14]},
    {"input_ids": [15, 16, 17, 18, 19], "labels": [-100, -100, -100, -100, 19]},
    {"input_ids": list(range(20, 60)), "labels": [-100] * 5 + list(range(25, 60))},
]


def test_padded_tensors():
    batch = build_collator(0, padding_free=False)(ROWS[1:3])
    assert batch["input_ids"].tolist() == [[12, 13, 14, 0, 0], [15, 16, 17, 18, 19]]
    assert batch["labels"].tolist() == [[-100, 13, 14, -100, -100], [-100, -100, -100, -100, 19]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_padding_free_tensors():
    batch = build_collator(0, padding_free=True)(ROWS[1:3])
    assert batch["input_ids"].tolist() == [[12, 13, 14, 15, 16, 17, 18, 19]]
    assert batch["labels"].tolist() == [[-100, 13, 14, -100, -100, -100, -100, 19]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert "attention_mask" not in batch


def test_packed_tensors():
    packed = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "seq_lengths": [3, 2]}
    batch = build_collator(0, padding_free=True)([packed, packed])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, 2, 3, -100, 5]]


def plain_loss(model, rows):
    """Mean cross-entropy over the labelled tokens, one row at a time, no collator, no trainer."""
    total, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        labels = torch.tensor(row["labels"][1:])
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def trainer_loss(model, batch, tmp_path):
    """What the task's trainer computes for a step."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    use_trained_positions()
    use_row_attention()
    trainer = SFTTrainer(
        model,
        config,
        data_collator=build_collator(0, True),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny.byte_level_tokenizer(),
    )
    items = (batch["labels"][..., 1:] != -100).sum()
    return trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)


def packed(rows):
    """The rows in one, as `--packing true` makes them."""
    ids, labels = (sum((row[name] for row in rows), []) for name in ("input_ids", "labels"))
    return [{"input_ids": ids, "labels": labels, "seq_lengths": [len(row["input_ids"]) for row in rows]}]


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, *tiny.VARIANTS])
@pytest.mark.parametrize(
    "form", ["padding-free", "padded", "packed", "padding-free, head frozen", "padded, head frozen"]
)
def test_loss_and_gradients_are_those_of_rows_one_by_one(architecture, form, tiny_models, tmp_path):
    folder = tiny_models(architecture)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for each in (model, reference):
        each.get_output_embeddings().weight.requires_grad_("frozen" not in form)
    expected = plain_loss(reference, ROWS)
    expected.backward()
    batch = build_collator(0, not form.startswith("padded"))(packed(ROWS) if form == "packed" else ROWS)
    loss = trainer_loss(model, batch, tmp_path)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_accumulation_is_one_big_batch(train, rows_file):
    """Rows of very different lengths: 4 steps of accumulation change the weights as one batch of all rows does."""
    from safetensors.torch import load_file

    flags = [
        "--precision",
        "fp32",
        "--train_mode",
        "full",
        "--num_train_epochs",
        "3",
        "--optim",
        "sgd",
        "--learning_rate",
        "0.5",
        "--lr_scheduler_type",
        "constant",
        "--warmup_steps",
        "0",
        "--max_grad_norm",
        "0",
    ]
    whole = train(*flags, "--per_device_train_batch_size", "8", output="whole")
    parts = train(*flags, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", output="parts")
    first, second = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    import json

    losses = [
        [
            entry["loss"]
            for entry in json.loads((run / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        for run in (whole, parts)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
