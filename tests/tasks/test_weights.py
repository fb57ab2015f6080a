"""`weight` of a message: exactly its part of loss and gradient, in every form; against the loss in plain PyTorch."""

import json
import math

import pytest
import tiny
import torch
from conftest import write_rows
from safetensors.torch import load_file
from test_accumulation import on_two
from transformers import AutoModelForCausalLM

from utils.data.conversations import to_messages
from utils.runtime.errors import UserError
from utils.template import get_template

ONE_STEP = ["--precision", "fp32", "--logging_steps", "1", "--max_steps", "1", "--optim", "sgd", "--learning_rate", "1",
            "--max_grad_norm", "0", "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--train_mode", "full",
            "--max_len", "128"]  # fmt: skip
ALL = ["--per_device_train_batch_size", "6"]


def talk(*answers):
    turns = [[{"role": "user", "content": f"Say {content}."}, {"role": "assistant", "content": content, **mark}]
             for content, mark in answers]  # fmt: skip
    return {"messages": [turn for pair in turns for turn in pair]}


ROWS = [
    talk(("one", {}), ("two three", {"weight": 0.25})),
    talk(("four", {"weight": 3}), ("five", {"weight": 0}), ("six", {"train": True})),
    talk(("seven eight nine", {})),
    talk(("ten", {"loss_weight": 0.5, "train": True})),
    talk(("eleven", {"weight": 1.0}), ("twelve", {"loss": False}), ("thirteen", {"weight": 1e-3})),
    talk(("fourteen", {}), ("fifteen", {})),
]


def with_whole_weights(row):
    marks = ("weight", "loss_weight")
    return {"messages": [{name: bool(value) if name in marks else value for name, value in turn.items()}
                         for turn in row["messages"]]}  # fmt: skip


def weight(turn):
    return turn.get("weight", turn.get("loss_weight", float(turn.get("loss", True))))


def plain_parts(model, tokenizer, rows):
    """Σ w·loss and the number of labelled tokens: each answer encoded alone, without the weights' code."""
    template, total, count = get_template("qwen", tokenizer), 0.0, 0
    for row in rows:
        marks = [weight(turn) for turn in row["messages"] if turn["role"] == "assistant"]
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        for answer, factor in enumerate(marks):
            kept = [{**turn, "train": False} if turn["role"] == "assistant" and i // 2 != answer else turn
                    for i, turn in enumerate(turns)]  # fmt: skip
            encoded = template.encode(kept, tokenizer)
            labels = torch.tensor(encoded["labels"])[1:]
            logits = model(torch.tensor([encoded["input_ids"]])).logits[0, :-1]
            if factor:
                loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
                total, count = total + factor * loss, count + int((labels != -100).sum())
    return total, count


@pytest.fixture(scope="module")
def plain(tiny_models, tokenizer):
    """The loss of all rows, and the weights after a step of SGD with a learning rate of 1."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    total, count = plain_parts(model, tokenizer, ROWS)
    loss = total / count
    loss.backward()
    return loss.item(), {name: (weight - weight.grad).detach() for name, weight in model.named_parameters()}


def assert_step_is(folder, plain):
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert log[0]["loss"] == pytest.approx(plain[0], rel=1e-6)
    saved = load_file(folder / "model.safetensors")
    for name, weight in plain[1].items():
        if name in saved:
            torch.testing.assert_close(saved[name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("flags", [
    ["--padding_free", "true", *ALL], ["--padding_free", "false", *ALL], ["--packing", "true", *ALL],
    ["--packing", "true", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "6"],
    ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3"],
], ids=["end-to-end", "padded", "packed", "packed-accumulated", "accumulated"])  # fmt: skip
def test_a_step_is_that_of_the_loss_written_out(train, tmp_path, plain, flags):
    assert_step_is(train(*ONE_STEP, *flags, data=write_rows(tmp_path / "rows.jsonl", ROWS)), plain)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize("padding_free", ["true", "false"])
def test_two_processes_weigh_as_one(tiny_models, tmp_path, plain, padding_free):
    """Of four and two rows, and with other numbers of tokens in each."""
    data, flags = write_rows(tmp_path / "rows.jsonl", ROWS), ["--padding_free", padding_free]
    flags += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    assert_step_is(on_two(tmp_path, tiny_models(), data, "two", *ONE_STEP, *flags)[0], plain)


def test_a_frozen_head_weighs_too(train, tmp_path, plain):
    """The adapter begins as the base, so that its first loss is the base's."""
    folder = train(*ONE_STEP, *ALL, "--train_mode", "lora", data=write_rows(tmp_path / "rows.jsonl", ROWS))
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert log[0]["loss"] == pytest.approx(plain[0], rel=1e-6)


def test_a_truncated_row_keeps_the_weights_of_what_is_left(parse, tokenizer, tmp_path):
    template = get_template("qwen", tokenizer)
    whole = template.encode(to_messages(ROWS[1]), tokenizer)
    length = len(template.encode(to_messages(talk(("five", {}), ("six", {}))), tokenizer)["input_ids"])
    args, train_args = parse("--train_data_path", write_rows(tmp_path / "rows.jsonl", ROWS[:2]),
                             "--max_len", str(length))  # fmt: skip
    rows = args.task.load_datasets(args, train_args, template, tokenizer).train
    assert rows[1]["loss_weights"] is None and {3.0, 1.0} == set(whole["loss_weights"])
    assert set(rows[0]["loss_weights"]) == {0.25, 1.0}  # as long as the second row is now, or shorter


def test_the_evaluation_weighs_its_loss_and_counts_tokens_for_the_perplexity(train, tmp_path, tiny_models, tokenizer):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    for padding_free in ("true", "false"):
        folder = train(*ONE_STEP, "--learning_rate", "0", "--eval_data_path", data, "--eval_strategy", "steps",
                       "--eval_steps", "1", "--per_device_eval_batch_size", "4", "--padding_free", padding_free,
                       data=data, output=padding_free)  # fmt: skip
        log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        found = next(entry for entry in log if "eval_loss" in entry)
        model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
        with torch.no_grad():
            total, count = plain_parts(model, tokenizer, ROWS)
            plain, number = plain_parts(model, tokenizer, [with_whole_weights(row) for row in ROWS])
        assert found["eval_loss"] == pytest.approx(float(total / count), rel=1e-6) and number == count
        assert found["eval_perplexity"] == pytest.approx(math.exp(float(plain / count)), rel=1e-5)


@pytest.mark.parametrize("template", ["qwen", "auto"])
def test_weights_are_those_of_an_answer_and_its_stop_token(template):
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.chat_template = get_template("qwen").to_jinja()
    messages = to_messages(talk(("Pear", {"weight": 0.5}), ("<|im_end|>Fig", {"weight": 2}), ("Plum", {})))
    encoded = get_template(template, tokenizer).encode(messages, tokenizer)
    parts = {}
    for token, label, factor in zip(*encoded.values(), strict=True):
        if label != -100:
            parts.setdefault(factor, []).append(token)
        else:
            assert factor == 1
    assert {factor: tokenizer.decode(ids) for factor, ids in parts.items()} == {
        0.5: "Pear<|im_end|>", 2.0: "<|im_end|>Fig<|im_end|>", 1.0: "Plum<|im_end|>",
    }  # fmt: skip


def test_a_run_on_everything_trains_everything(train, tmp_path, tiny_models, tokenizer):
    """The doctor looks for a trained stop token in each row, not at its end, where the format's line feed is."""
    rows = [talk(("one", {}), ("two", {"weight": 0})), talk(("three", {}))]
    folder = train(*ONE_STEP, *ALL, "--train_on", "prompt", data=write_rows(tmp_path / "rows.jsonl", rows))
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    template, total, count = get_template("qwen", tokenizer), 0.0, 0
    for row in rows:
        turns = [{**turn, "train": turn.get("weight", 1) != 0} for turn in row["messages"]]
        answers = [{**turn, "train": not turn["train"]} for turn in turns]
        encoded, left_out = template.encode(turns, tokenizer), set()
        for place, label in enumerate(template.encode(answers, tokenizer)["labels"]):
            left_out |= {place} if label != -100 else set()
        labels = [-100 if place in left_out else token for place, token in enumerate(encoded["input_ids"])]
        with torch.no_grad():
            logits = model(torch.tensor([encoded["input_ids"]])).logits[0, :-1]
        targets = torch.tensor(labels)[1:]
        total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        count += int((targets != -100).sum())
    assert log[0]["loss"] == pytest.approx(total / count, rel=1e-6)


def test_rows_without_weights_have_no_column(parse, tokenizer, tmp_path):
    template = get_template("qwen", tokenizer)
    rows = [talk(("one", {"weight": 1}), ("two", {"weight": 0}))]
    for flags in ([], ["--packing", "true"]):
        args, train_args = parse("--train_data_path", write_rows(tmp_path / "rows.jsonl", rows), *flags)
        for _ in ("prepared", "found"):
            data = args.task.load_datasets(args, train_args, template, tokenizer)
            assert "loss_weights" not in data.train.column_names


@pytest.mark.parametrize("flags", [["--loss_type", "dft"], ["--label_smoothing_factor", "0.1"]])
def test_a_loss_that_cannot_be_weighted_is_refused_before_the_weights_load(train, tmp_path, flags):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=f"{flags[0]} .*does not weight"):
        train(*flags, data=data)


def test_losses_by_source_are_weighted_and_those_of_the_ledger_are_not(train, tmp_path):
    import pyarrow.parquet

    parts = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", ROWS[:2]), ("b", ROWS[2:]))]
    data = ",".join(parts)
    folder = train(*ONE_STEP, *ALL, "--row_ledger", "true", "--eval_data_path", data, "--eval_strategy", "steps",
                   "--eval_steps", "1", data=data)  # fmt: skip
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    for prefix in ("", "eval_"):
        found = next(entry for entry in log if f"{prefix}loss" in entry)
        losses = {name: value for name, value in found.items() if name.startswith(f"{prefix}loss/")}
        tokens = {name.replace("tokens", "loss"): found[name] for name in found if name.startswith(f"{prefix}tokens/")}
        assert len(losses) == 2
        total = sum(losses[name] * tokens[name] for name in losses)
        assert total == pytest.approx(found[f"{prefix}loss"] * sum(tokens.values()), rel=1e-5)
    ledger = pyarrow.parquet.read_table(folder / "row_ledger.parquet").to_pylist()
    whole = train(*ONE_STEP, *ALL, "--row_ledger", "true", output="whole",
                  data=write_rows(tmp_path / "whole.jsonl", [with_whole_weights(row) for row in ROWS]))  # fmt: skip
    plain = pyarrow.parquet.read_table(whole / "row_ledger.parquet").to_pylist()
    assert [row["first_loss"] for row in ledger] == pytest.approx([row["first_loss"] for row in plain], rel=1e-5)
