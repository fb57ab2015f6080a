"""explain: its plan against real runs, its table of idle settings against the losses, and what it prints."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import ROOT, write_rows
from safetensors import safe_open

import main_train
from utils.args import parse_with_sources
from utils.config.recipe import REPLACED_FLAGS
from utils.explain.explain import explain
from utils.explain.report import text_of
from utils.explain.unused import TABLE, without_effect
from utils.script.explain import main
from utils.tasks import TASKS, get_task
from utils.tasks.no_effect import RunSettings
from utils.train.plan import first_epoch, measure

DPO = ["--train_args_path", "train_args/dpo/base.py"]
SINGLE = [*DPO, "--task_type", "dpo_single"]
PRETRAIN = ["--train_args_path", "train_args/pretrain/base.py"]
FULL = ["--train_mode", "full"]
EVAL = ["--val_size", "2"]
TEXTS = [{"text": text[: 20 * number]} for number in range(1, 6) for text in tiny.TEXT[:2]]


def rows_for(flags, path) -> str:
    return write_rows(path, tiny.PAIRS if DPO[1] in flags else TEXTS if PRETRAIN[1] in flags else tiny.ROWS)


@pytest.fixture
def flags_for(tiny_models, tmp_path):
    """A whole command line, with a model, rows that suit the task, and a folder that is not there yet."""

    def build(*flags, folder="explained"):
        data = rows_for(flags, tmp_path / "rows.jsonl")
        paths = ["--model_name_or_path", tiny_models(), "--train_data_path", data]
        return [*paths, "--output_dir", str(tmp_path / folder), "--report_to", "none", *flags]

    return build


@pytest.fixture
def explained(flags_for):
    """What is found out of a command line."""

    def run(*flags, processes=1):
        return explain(*parse_with_sources(flags_for(*flags)), processes)

    return run


@pytest.fixture
def trained(flags_for):
    """A run's history by the same flags, every step of it logged; its folder."""

    def run(*flags, folder="trained"):
        more = ["--logging_steps", "1", "--disable_tqdm", "true", "--card_samples", "0", "--precision", "fp32"]
        argv = flags_for(*more, *flags, folder=folder)
        main_train.main(argv)
        path = argv[argv.index("--output_dir") + 1]
        return json.loads(Path(path, "trainer_state.json").read_text()), path

    return run


# ------------------------------------------------------------------ the plan
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
def test_the_plan_is_what_a_run_does(explained, trained, flags):
    plan = explained("--logging_steps", "1", *flags).plan
    state, folder = trained(*flags)
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


def test_rows_are_counted_as_they_lie_in_the_dataset(explained):
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


def test_padding_is_what_the_collator_adds(explained):
    from utils.model.tokenizer import tokenizer_of
    from utils.tasks import get_task

    for flags in (["--padding_free", "false"], [], [*DPO, "--max_len", "64"], [*SINGLE, "--max_len", "64"]):
        found = explained("--per_device_train_batch_size", "3", *flags)
        collate = get_task(found.args.task_type).build_collator(found.args, found.train_args, tokenizer_of(found.args))
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
def test_two_processes_do_what_was_planned(explained, flags_for, tmp_path):
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
    empty = 1  # row of one token, where a process has no other left in the last update
    assert losses[1]["num_tokens"] == plan["tokens_per_update"]["mean"] * 2 + empty


@pytest.mark.parametrize(
    "flags", [["--lora_rank", "3"], ["--use_dora", "true"], FULL, ["--init_lora_weights", "pissa"]]
)
def test_trained_weights_are_counted(explained, trained, flags):
    off = ["--train_special_tokens", "off", "--max_steps", "1", *flags]
    counted = explained(*off).weights
    _, folder = trained(*off)
    saved = 0
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if os.path.exists(f"{folder}/{name}"):
            with safe_open(f"{folder}/{name}", "pt") as file:
                saved += sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    doubled = 2 if "pissa" in flags else 1  # PiSSA is saved as LoRA of twice the rank
    assert saved == counted.trained * doubled


def test_no_row_left_for_a_batch(explained):
    from utils.runtime.errors import UserError

    with pytest.raises(UserError, match="--dataloader_drop_last true leaves none of the 8 rows"):
        explained("--dataloader_drop_last", "true", "--per_device_train_batch_size", "16")


# ------------------------------------------------------------------ idle settings
# first name, beginning of why, flags with which the row is idle, flags (or what cannot be a flag) with which it is not
NOT_IDLE = [
    ("lora_rank", "--train_mode full", FULL, []),
    ("lora_target_modules", "it is for a new adapter", FULL, []),
    ("max_prompt_length", "only preference pairs", [], DPO),
    ("template_name", "plain text", PRETRAIN, []),
    ("train_on", "DPO compares", DPO, []),
    ("train_on", "every token", PRETRAIN, []),
    ("overlong", "packed text", PRETRAIN, [*PRETRAIN, "--packing", "false"]),
    ("padding_free", "TRL's DPO", DPO, SINGLE),
    ("length_column_name", "only --train_sampling", [], ["--train_sampling_strategy", "group_by_length"]),
    ("dataloader_in_order", "--dataloader_num_workers", [], ["--dataloader_num_workers", "1"]),
    ("dataloader_pin_memory", "without a GPU", [], {"use_cpu": False}),
    ("num_train_epochs", "--max_steps", ["--max_steps", "3"], []),
    ("warmup_steps", "this --lr_scheduler_type", ["--lr_scheduler_type", "constant"],
     ["--lr_scheduler_type", "constant_with_warmup"]),
    ("lr_scheduler_kwargs", "this --lr_scheduler_type", ["--lr_scheduler_type", "constant_with_warmup"], []),
    ("ignore_data_skip", "the run does not", [], {"resume_from_checkpoint": "run/checkpoint-1"}),
    ("adam_beta1", "this --optim", ["--optim", "sgd"], []),
    ("adam_epsilon", "this --optim", ["--optim", "adafactor"], []),
    ("label_smoothing_factor", "--loss_type dft", ["--loss_type", "dft"], []),
    ("label_smoothing_factor", "DPO's own", DPO, []),
    ("loss_type", "the loss of dpo_single", SINGLE, DPO),
    ("beta", "--loss_type sft", [*DPO, "--loss_type", "sft"], DPO),
    ("label_smoothing", "only --loss_type", DPO, [*DPO, "--loss_type", "robust", "--label_smoothing", "0.1"]),
    ("discopop_tau", "it is for", DPO, [*DPO, "--loss_type", "discopop"]),
    ("f_alpha_divergence_coef", "it is for", DPO, [*DPO, "--f_divergence_type", "alpha_divergence"]),
    ("ref_model_sync_steps", "it is for --sync_ref_model", DPO, [*DPO, *FULL, "--sync_ref_model", "true"]),
    ("precompute_ref_batch_size", "it is for --precompute", DPO, [*DPO, "--precompute_ref_log_probs", "true"]),
    ("eval_steps", "--eval_strategy is not steps", [*EVAL, "--eval_strategy", "epoch"], EVAL),
    ("eval_delay", "nothing is evaluated during", [], EVAL),
    ("per_device_eval_batch_size", "nothing", [], [*EVAL, "--eval_strategy", "no", "--eval_on_start", "true"]),
    ("bf16_full_eval", "nothing", [], EVAL),
    ("prediction_loss_only", "evaluation adds", EVAL, [*DPO, *EVAL]),
    ("early_stopping_threshold", "--early", [], [*EVAL, "--early_stopping_patience", "2"]),
    ("metric_for_best_model", "nothing", [], EVAL),
    ("greater_is_better", "no evaluation", EVAL, [*EVAL, "--load_best_model_at_end", "true"]),
    ("save_steps", "--save_strategy", ["--save_strategy", "epoch"], []),
    ("save_total_limit", "--save_strategy no", ["--save_strategy", "no"], []),
    ("logging_steps", "--logging_strategy", ["--logging_strategy", "epoch"], []),
    ("run_name", "no --report_to", [], {"report_to": ["wandb"]}),
    ("project", "it is for", [], {"report_to": ["trackio"]}),
    ("hub_model_id", "--push_to_hub", [], {"push_to_hub": True}),
    ("activation_checkpointing_kwargs", "--gradient", ["--gradient_checkpointing", "false"], []),
    ("liger_kernel_config", "--use_liger", [], {"use_liger_kernel": True}),
    ("torch_empty_cache_steps", "without a GPU", [], {"use_cpu": False}),
    ("average_tokens_across_devices", "there is one", [], {"processes": 2}),
    ("ddp_find_unused_parameters", "Distributed", [], {"processes": 2}),
    ("ddp_backend", "there is one", [], {"processes": 2}),
    ("fsdp_config", "--fsdp", [], {"fsdp": "full_shard"}),
    ("do_eval", "--eval_strategy", [], EVAL),
]  # fmt: skip
TABLES = [TABLE, *(get_task(name).settings_without_effect for name in TASKS)]
ROWS = list({id(row): row for table in TABLES for row in table}.values())
ALWAYS = {"remove_unused_columns", "do_train", *REPLACED_FLAGS}


def case_of(flags_for, given):
    """A combination as the table sees it; what cannot be a flag on this machine is set afterwards."""
    flags = given if isinstance(given, list) else []
    args, train_args, _ = parse_with_sources(flags_for(*flags))
    case = RunSettings(args, train_args, rows_to_evaluate=bool(args.eval_data_path or args.val_size))
    for name, value in {} if isinstance(given, list) else given.items():
        own = name in {field.name for field in dataclasses.fields(RunSettings)}
        setattr(case if own else train_args, name, value)
    return case


def holds(row, settings):
    return row in (*TABLE, *settings.args.task.settings_without_effect) and row.when(settings)


def row_of(name, why):
    found = [row for row in ROWS if row.names[0] == name and row.why.startswith(why)]
    assert len(found) == 1, (name, why)
    return found[0]


def test_every_row_of_the_table_is_tried():
    tried = {id(row_of(name, why)) for name, why, *_ in NOT_IDLE}
    assert {row.names[0] for row in ROWS if id(row) not in tried} == ALWAYS


@pytest.mark.parametrize(("name", "why", "idle", "active"), NOT_IDLE, ids=[f"{one[0]}: {one[1]}" for one in NOT_IDLE])
def test_a_row_is_idle_in_one_combination_and_not_in_another(flags_for, name, why, idle, active):
    row = row_of(name, why)
    assert holds(row, case_of(flags_for, idle))
    assert not holds(row, case_of(flags_for, active))
    found = without_effect(case_of(flags_for, idle))
    for one in row.names:
        assert one in found or one in ("loss_weights",) or not hasattr(case_of(flags_for, idle), one), one


def test_names_in_the_table_are_settings(flags_for):
    holders = [parse_with_sources(flags_for(*flags))[:2] for flags in ([], DPO)]
    for name in {name for row in ROWS for name in row.names}:
        assert any(hasattr(one, name) for pair in holders for one in pair), name


# a combination, and every setting it makes idle, set to something else: nothing may change
NOTHING_CHANGES = [
    ([*FULL, *EVAL, "--lr_scheduler_type", "constant", "--optim", "sgd", "--loss_type", "dft"],
     ["--lora_rank", "3", "--lora_alpha", "5", "--lora_dropout", "0.5", "--train_special_tokens", "on",
      "--max_prompt_length", "9", "--num_train_epochs", "7", "--warmup_steps", "5", "--lr_scheduler_kwargs",
      '{"num_cycles": 3}', "--adam_beta1", "0.5", "--adam_beta2", "0.5", "--adam_epsilon", "1",
      "--remove_unused_columns", "false", "--length_column_name", "x",
      "--label_smoothing_factor", "0.3", "--prediction_loss_only", "true",
      "--eval_accumulation_steps", "1", "--eval_do_concat_batches", "false", "--batch_eval_metrics", "true",
      "--eval_use_gather_object", "true", "--run_name", "x", "--project", "x",
      "--average_tokens_across_devices", "false", "--ddp_bucket_cap_mb", "1", "--ddp_find_unused_parameters", "true",
      "--torch_empty_cache_steps", "1", "--dataloader_in_order", "false", "--do_train", "true", "--do_predict", "true",
      "--gradient_checkpointing_kwargs", '{"use_reentrant": false}', "--ignore_data_skip", "true",
      "--hub_model_id", "x/y", "--hub_strategy", "end", "--greater_is_better", "true"]),
    ([*DPO, "--loss_type", "sft", "--max_len", "64"],
     ["--beta", "0.7", "--padding_free", "false", "--eval_steps", "3", "--eval_delay", "1",
      "--per_device_eval_batch_size", "1", "--bf16_full_eval", "true"]),
    ([*PRETRAIN, "--max_len", "32"],
     ["--template_name", "yi", "--train_on", "last_turn", "--train_special_tokens", "on", "--overlong", "error",
      "--max_prompt_length", "3", "--metric_for_best_model", "loss"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "idle"), NOTHING_CHANGES, ids=["sft full", "dpo_multi", "pretrain"])
def test_what_is_idle_changes_no_loss_and_no_weight(explained, trained, flags, idle):
    flags = [*flags, "--max_steps", "2", "--save_strategy", "no"]
    told = explained(*flags, *idle).no_effect
    names = {flag.removeprefix("--") for flag in idle if flag.startswith("--")}
    assert names <= set(told), names - set(told)
    one, other = (trained(*flags, *more, folder=name) for name, more in (("one", []), ("other", idle)))
    kept = [
        [entry.get(name) for entry in state["log_history"] for name in ("loss", "eval_loss")]
        for state, _ in (one, other)
    ]
    assert kept[0] == kept[1] and sum(value is not None for value in kept[0]) >= 2
    for name in ("model.safetensors", "adapter_model.safetensors"):
        files = [Path(folder) / name for _, folder in (one, other)]
        if files[0].exists():
            assert files[0].read_bytes() == files[1].read_bytes()


# ------------------------------------------------------------------ what is printed
def printed(capsys, *argv) -> str:
    capsys.readouterr()
    main(list(argv))
    return capsys.readouterr().out


def test_the_text_says_what_matters(flags_for, capsys):
    text = printed(capsys, *flags_for(*FULL, "--lora_rank", "8", "--num_train_epochs", "3", *EVAL))
    plan, *rest = text.split("\n\n")
    assert "3 updates = 3 epochs of 1 (--num_train_epochs)" in plan and "6 of 8 train, 2 evaluate" in plan
    assert "6 examples (1 process × 1 pass × 6 rows)" in plan
    flags = next(part for part in rest if part.startswith("Values: flags"))
    assert "--lora_rank 8" in flags
    recipe = next(part for part in rest if part.startswith("Values: the recipe"))
    assert "learning_rate" in recipe and "train_args/sft/base.py:" in recipe
    assert not any(part.startswith("Values: the libraries'") for part in rest)
    assert "lora_rank 8 (--lora_rank 8)\n    --train_mode full trains every weight" in text
    assert "train_special_tokens" not in text  # nobody set it, and it has no effect
    everything = printed(capsys, *flags_for(*FULL), "--all", "true")
    assert "adam_beta1" in everything and "transformers' TrainingArguments" in everything
    assert "token" not in {line.split()[0].rpartition("_")[2] for line in everything.splitlines() if line.split()}


def test_the_json_holds_everything(flags_for, capsys):
    found = json.loads(printed(capsys, *flags_for("--lora_rank", "8"), "--json", "true", "--processes", "2"))
    assert found["plan"]["processes"] == 2 and found["task"] == "sft" and "steps" not in found["plan"]["logging"]
    assert found["values"]["lora_rank"] == {"value": 8, "kind": "flag", "from": "--lora_rank 8", "idle": None}
    assert found["values"]["max_prompt_length"]["idle"] and found["values"]["adam_beta1"]["kind"] == "library"
    assert all("kind" in value for value in found["values"].values())


def test_nothing_is_written_but_prepared_rows(flags_for, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    printed(capsys, *flags_for("--cache_dir", str(tmp_path / "cache")))
    new = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert {path.relative_to(tmp_path).parts[0] for path in new} == {"cache", "rows.jsonl"}


def test_a_recipes_line_without_a_type_is_told(flags_for, capsys, tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text((ROOT / "train_args/sft/base.py").read_text() + "    adam_beta1 = 0.5\n")
    text = printed(capsys, *flags_for("--train_args_path", str(recipe)))
    line = len(recipe.read_text().splitlines())
    assert f"adam_beta1 at {recipe}:{line}\n    it has no type annotation" in text


def test_what_differs_from_a_run(train, capsys, tmp_path, rows_file, tiny_models):
    run = train("--max_steps", "2", "--card_samples", "0", output="then")
    again = ["--config", str(run), "--diff", str(run)]
    assert "nothing differs" in printed(capsys, *again)
    record = json.loads((run / "train_args.json").read_text())
    record["versions"]["trl"], record["hardware"]["gpus"] = "0.0.1", ["A GPU"]
    (run / "train_args.json").write_text(json.dumps(record))
    write_rows(tmp_path / "rows.jsonl", tiny.ROWS[:5])
    text = printed(capsys, *again, "--learning_rate", "1e-5", "--max_steps", "3", "--processes", "2")
    told = text[text.index("Compared with") :]
    for part in ("learning_rate", "0.002 → 1e-05", "--learning_rate 1e-5", "trl version", "0.0.1 → ", "A GPU → none",
                 "sha256 of the train data", "processes", "1 → 2", "updates", "2 → 3"):  # fmt: skip
        assert part in told, part
    found = json.loads(printed(capsys, *again, "--seed", "7", "--json", "true"))["diff"]["differs"]
    assert found["seed"] == {"then": "42", "now": "7", "from": "--seed 7"}


@pytest.mark.parametrize(
    ("flag", "value", "most"),
    [("--num_train_epochs", "1e30", "1,000,000"), ("--max_steps", "10000000000", "10,000,000")],
)
def test_more_updates_than_can_be_planned(refused, flags_for, flag, value, most):
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


def test_an_adapter_for_modules_that_are_not_there(refused, flags_for):
    assert "no linear layer to adapt is named 'nope'" in refused(main, *flags_for("--lora_target_modules", "nope"))


def test_all_problems_at_once(refused, tmp_path):
    said = refused(
        main, "--processes", "2000", "--diff", "nowhere", "--lerning_rate", "1", "--max_len", "1", "--all", "x"
    )
    assert said.startswith("5 errors")
    for part in ("--processes 2000", "--diff 'nowhere' is not a file", "--lerning_rate", "--max_len 1", "--all"):
        assert part in said
    flags = tmp_path / "flags.json"
    flags.write_text('{"seed": 3}')
    assert "holds flags, not a run" in refused(main, "--diff", str(flags))


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_file_with_auto_resolved(flags_for, stage):
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


def test_checkpointing_is_told_as_the_models_size_decides_it(explained, monkeypatch):
    monkeypatch.setattr("utils.model.options.CHECKPOINTING_FROM", 10)
    found = explained()
    assert found.values["gradient_checkpointing"] is True and "weights" in found.sources["gradient_checkpointing"].where
    asked = explained("--gradient_checkpointing", "false")
    assert asked.values["gradient_checkpointing"] is False and asked.sources["gradient_checkpointing"].kind == "flag"
