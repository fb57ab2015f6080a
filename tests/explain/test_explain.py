"""What explain counts: the plan against real runs, weights, and DeepSpeed's file."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from explaining import DPO, EVAL, FULL, PRETRAIN, SINGLE, printed
from safetensors import safe_open

from utils.args import parse_with_sources
from utils.explain.explain import explain
from utils.explain.report import text_of
from utils.script.explain import main
from utils.tasks import get_task
from utils.train.plan import first_epoch, measure


@pytest.mark.parametrize(
    "flags",
    [
        ["--per_device_train_batch_size", "3", "--num_train_epochs", "2", "--val_size", "1", "--save_total_limit", "9",
         "--eval_steps", "4", "--save_steps", "4"],
        ["--per_device_train_batch_size", "3", "--num_train_epochs", "2.4", "--dataloader_drop_last", "true",
         "--gradient_accumulation_steps", "2", "--lr_scheduler_type", "constant_with_warmup"],
        ["--per_device_train_batch_size", "2", "--max_steps", "7", "--save_strategy", "epoch", "--eval_strategy",
         "epoch", *EVAL, "--eval_delay", "2", "--warmup_steps", "3", "--train_sampling_strategy", "sequential"],
        ["--per_device_train_batch_size", "1", "--packing", "true", "--max_len", "128", "--num_train_epochs", "2"],
        ["--per_device_train_batch_size", "2", "--train_sampling_strategy", "batch_rebalance", "--data_seed", "5",
         "--num_train_epochs", "1", "--lr_scheduler_type", "linear"],
        [*PRETRAIN, "--per_device_train_batch_size", "2", "--max_len", "32", "--train_mode", "full"],
        [*DPO, "--per_device_train_batch_size", "3", "--num_train_epochs", "1", *EVAL, "--max_len", "64"],
        [*SINGLE, "--per_device_train_batch_size", "4", "--num_train_epochs", "2", "--max_len", "64"],
    ],
    ids=["last smaller", "drop_last", "max_steps", "packing", "rebalance", "pretrain", "dpo_multi", "dpo_single"],
)  # fmt: skip
def test_the_plan_equals_a_run(explained, train_explained, flags):
    plan = explained("--logging_steps", "1", *flags).plan
    state, folder = train_explained(*flags)
    history = state["log_history"]
    losses = [entry for entry in history if "loss" in entry]
    assert plan["steps"] == state["max_steps"] == state["global_step"]
    assert plan["epochs"] == pytest.approx(state["epoch"], abs=0.01 if "--dataloader_drop_last" not in flags else 1)
    assert plan["logging"]["steps"] == [entry["step"] for entry in losses]
    assert plan["eval"]["steps"] == [entry["step"] for entry in history if "eval_loss" in entry]
    if "--save_total_limit" in flags:
        written = {int(name.split("-")[1]) for name in os.listdir(folder) if name.startswith("checkpoint-")}
        assert set(plan["save"]["steps"]) == written
    rates = [entry["learning_rate"] for entry in losses]
    planned = plan["learning_rate"]
    assert (planned["first"], planned["last"]) == pytest.approx((rates[0], rates[-1]))
    assert planned["highest"] == pytest.approx(max(rates))
    # the tokens of each update of the first epoch, by TRL's own count
    counts = [entry["num_tokens"] for entry in losses if "num_tokens" in entry][: plan["updates_per_epoch"]]
    each = [after - before for before, after in zip([0, *counts], counts, strict=False)]
    tokens = plan["tokens_per_update"]
    if each:  # dpo_single does not count them
        assert (tokens["smallest"], tokens["largest"]) == (min(each), max(each))
        assert each[tokens["at"] - 1] == max(each) and tokens["mean"] == pytest.approx(sum(each) / len(each))


def test_counts_of_rows_equal_the_dataset(explained):
    for flags in ([], ["--packing", "true", "--max_len", "64"], [*DPO, "--max_len", "64"], [*PRETRAIN]):
        found = explained(*flags)
        dataset, counted = found.data.train, measure(found.data.train, found.args.task.row_type)
        pairs = DPO[1] in flags
        sides = ("chosen", "rejected")
        for place, row in enumerate(dataset):
            parts = [row["prompt_ids"] + row[f"{side}_ids"] for side in sides] if pairs else [row["input_ids"]]
            labels = sum((row[f"{side}_labels"] for side in sides), []) if pairs else row["labels"]
            assert counted.tokens[place] == sum(map(len, parts)) and counted.longest[place] == max(map(len, parts))
            assert counted.trained[place] == sum(label != -100 for label in labels)
            assert counted.examples[place] == len(row.get("seq_lengths", [0]))
        assert counted.sequences == (2 if pairs else 1)


def test_padding_equals_the_collators(explained):
    from utils.model.tokenizer import load_run_tokenizer

    for flags in (["--padding_free", "false"], [], [*DPO, "--max_len", "64"], [*SINGLE, "--max_len", "64"]):
        found = explained("--per_device_train_batch_size", "3", *flags)
        collate = get_task(found.args.task_type).build_collator(
            found.args, found.train_args, load_run_tokenizer(found.args)
        )
        rows = measure(found.data.train, found.args.task.row_type)
        passes = [batch for update in first_epoch(found.train_args, rows, 1) for one in update for batch in one]
        sizes = [collate([found.data.train[row] for row in batch])["input_ids"].numel() for batch in passes]
        computed = found.plan["computed_per_pass"]
        assert (computed["largest"], computed["mean"]) == (max(sizes), pytest.approx(sum(sizes) / len(sizes)))


def test_several_processes_share_the_rows(explained):
    """8 rows in batches of 3: [3, 3, 2] → two passes for each of two processes, the last of one of them empty."""
    found = explained("--per_device_train_batch_size", "3", "--num_train_epochs", "1", processes=2)
    assert (found.plan["steps"], found.plan["rows_repeated"]) == (2, 0)
    (first,), (second,) = first_epoch(found.train_args, measure(found.data.train, found.args.task.row_type), 2)
    begun = [*first[0], *first[1]]
    assert len(set(begun)) == 6 and set(second[0][:2]) == set(range(8)) - set(begun)
    assert [len(batch) for one in (first, second) for batch in one] == [3, 3, 2, 0]
    dropped = explained("--per_device_train_batch_size", "3", "--dataloader_drop_last", "true", processes=2)
    assert dropped.plan["updates_per_epoch"] == 1 and dropped.plan["rows_repeated"] == -2


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_the_plan_of_two_processes_equals_their_run(explained, flags_for, tmp_path):
    flags = ["--per_device_train_batch_size", "3", "--num_train_epochs", "2", "--logging_steps", "1", "--precision",
             "fp32", "--card_samples", "0"]  # fmt: skip
    plan = explained(*flags, processes=2).plan
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "main_train.py", *flags_for(*flags, folder="two")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads((tmp_path / "two" / "trainer_state.json").read_text())
    losses = [entry for entry in state["log_history"] if "loss" in entry]
    assert state["max_steps"] == plan["steps"] == 4
    # the row of a process that has no other left in the last update is not counted
    assert losses[1]["num_tokens"] == plan["tokens_per_update"]["mean"] * 2


@pytest.mark.parametrize(
    "flags", [["--lora_rank", "3"], ["--use_dora", "true"], FULL, ["--init_lora_weights", "pissa"]]
)
def test_trained_weights_are_counted(explained, train_explained, flags):
    off = ["--train_special_tokens", "off", "--max_steps", "1", *flags]
    counted = explained(*off).weights
    _, folder = train_explained(*off)
    saved = 0
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if os.path.exists(f"{folder}/{name}"):
            with safe_open(f"{folder}/{name}", "pt") as file:
                saved += sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    doubled = 2 if "pissa" in flags else 1  # PiSSA is saved as LoRA of twice the rank
    assert saved == counted.trained * doubled


def test_no_row_for_a_full_batch(explained):
    from utils.runtime.errors import UserError

    with pytest.raises(UserError, match="--dataloader_drop_last true leaves none of the 8 rows"):
        explained("--dataloader_drop_last", "true", "--per_device_train_batch_size", "16")


def test_only_prepared_rows_are_written(flags_for, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    printed(capsys, *flags_for("--cache_dir", str(tmp_path / "cache")))
    new = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert {path.relative_to(tmp_path).parts[0] for path in new} == {"cache", "rows.jsonl"}


@pytest.mark.parametrize(
    ("flag", "value", "most"),
    [("--num_train_epochs", "1e30", "1,000,000"), ("--max_steps", "10000000000", "10,000,000")],
)
def test_too_many_updates_to_plan(refused, flags_for, flag, value, most):
    said = refused(main, *flags_for(flag, value))
    assert flag in said and re.search(rf"at most {most}\b(?!,)", said)


def test_a_model_that_cannot_be_built(refused, flags_for):
    flags = flags_for()
    file = Path(flags[flags.index("--model_name_or_path") + 1]) / "config.json"
    kept = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(kept) | {"num_attention_heads": 0}))
        assert "--model_name_or_path" in refused(main, *flags)
    finally:
        file.write_text(kept)


def test_target_modules_the_model_does_not_have(refused, flags_for):
    assert "no linear layer to adapt is named 'nope'" in refused(main, *flags_for("--lora_target_modules", "nope"))


@pytest.mark.parametrize("stage", [2, 3])
def test_auto_in_deepspeeds_file_is_resolved(flags_for, stage):
    """As transformers reads it; the processes need not be joined for that."""
    from transformers.integrations import deepspeed

    args, train_args, sources = parse_with_sources(flags_for("--gradient_accumulation_steps", "2", *FULL))
    file = ROOT / f"train_args/deepspeed_config/ds_config_zero{stage}.json"
    train_args.deepspeed = str(file)
    train_args.hf_deepspeed_config = deepspeed.HfTrainerDeepSpeedConfig(str(file))
    train_args.hf_deepspeed_config.trainer_config_process(train_args)
    try:
        found = explain(args, train_args, sources, 4)
        assert deepspeed.is_deepspeed_zero3_enabled() == (stage == 3)  # as it was before
    finally:
        deepspeed.unset_hf_deepspeed_config()
    values, name = found.deepspeed["values"], f"zero{stage}"
    written = json.loads(file.read_text())
    assert found.deepspeed["file"] == name
    for key, value in written["zero_optimization"].items():
        if value != "auto":
            assert values[f"zero_optimization.{key}"] == {"value": value, "from": name}
    assert values["train_batch_size"]["value"] == 16 * 2 * 4
    assert values["gradient_clipping"] == {"value": 1.0, "from": f'{name}, "auto": --max_grad_norm'}
    assert "auto" not in [one["value"] for one in values.values()]
    if stage == 3:  # by the hidden size of tiny.config_for
        assert values["zero_optimization.reduce_bucket_size"]["value"] == 64 * 64
        assert values["zero_optimization.stage3_param_persistence_threshold"]["value"] == 640
    assert found.weights.weights > 64 * 500  # ZeRO-3 would have left each process a part
    assert "Values of DeepSpeed's file" in text_of(found, False, None)


def test_gradient_checkpointing_follows_the_models_size(explained, monkeypatch):
    monkeypatch.setattr("utils.model.options.CHECKPOINTING_FROM", 10)
    found = explained()
    assert found.values["gradient_checkpointing"] is True and "weights" in found.sources["gradient_checkpointing"].where
    asked = explained("--gradient_checkpointing", "false")
    assert asked.values["gradient_checkpointing"] is False and asked.sources["gradient_checkpointing"].kind == "flag"
