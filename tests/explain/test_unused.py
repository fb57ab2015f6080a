"""Settings without effect: each row of the tables in a combination, and against the losses of real runs."""

import dataclasses
from pathlib import Path

import pytest
from explaining import DPO, EVAL, FULL, PRETRAIN, SINGLE

from utils.args import parse_with_sources
from utils.config.recipe import REPLACED_FLAGS
from utils.explain.unused import TABLE, without_effect
from utils.tasks import TASKS, get_task
from utils.tasks.no_effect import RunSettings

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
    ("shuffle_buffer", "only --streaming true", [], ["--streaming", "true"]),
    ("dataset_num_proc", "--streaming true tokenises", ["--streaming", "true"], []),
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
    ("discopop_tau", "only --loss_type discopop", DPO, [*DPO, "--loss_type", "discopop"]),
    ("f_alpha_divergence_coef", "only --f_divergence_type", DPO, [*DPO, "--f_divergence_type", "alpha_divergence"]),
    ("ref_model_sync_steps", "only --sync_ref_model true uses it", DPO, [*DPO, *FULL, "--sync_ref_model", "true"]),
    ("precompute_ref_batch_size", "only --precompute_ref", DPO, [*DPO, "--precompute_ref_log_probs", "true"]),
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


def test_every_row_of_the_tables_is_tested():
    tried = {id(row_of(name, why)) for name, why, *_ in NOT_IDLE}
    assert {row.names[0] for row in ROWS if id(row) not in tried} == ALWAYS


@pytest.mark.parametrize(("name", "why", "idle", "active"), NOT_IDLE, ids=[f"{one[0]}: {one[1]}" for one in NOT_IDLE])
def test_a_row_applies_in_one_combination_and_not_in_another(flags_for, name, why, idle, active):
    row = row_of(name, why)
    assert holds(row, case_of(flags_for, idle))
    assert not holds(row, case_of(flags_for, active))
    found = without_effect(case_of(flags_for, idle))
    for one in row.names:
        assert one in found or one in ("loss_weights",) or not hasattr(case_of(flags_for, idle), one), one


def test_names_in_the_tables_are_settings(flags_for):
    holders = [parse_with_sources(flags_for(*flags))[:2] for flags in ([], DPO)]
    for name in {name for row in ROWS for name in row.names}:
        assert any(hasattr(one, name) for pair in holders for one in pair), name


# a combination, and every setting it makes idle, set to something else: nothing may change
NOTHING_CHANGES = [
    ([*FULL, *EVAL, "--lr_scheduler_type", "constant", "--optim", "sgd", "--loss_type", "dft"],
     ["--lora_rank", "3", "--lora_alpha", "5", "--lora_dropout", "0.5", "--train_special_tokens", "on",
      "--max_prompt_length", "9", "--num_train_epochs", "7", "--warmup_steps", "5", "--lr_scheduler_kwargs",
      '{"num_cycles": 3}', "--adam_beta1", "0.5", "--adam_beta2", "0.5", "--adam_epsilon", "1",
      "--remove_unused_columns", "false", "--length_column_name", "x", "--shuffle_buffer", "4",
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
def test_settings_without_effect_change_no_loss_and_no_weight(explained, train_explained, flags, idle):
    flags = [*flags, "--max_steps", "2", "--save_strategy", "no"]
    reported = explained(*flags, *idle).no_effect
    names = {flag.removeprefix("--") for flag in idle if flag.startswith("--")}
    assert names <= set(reported), names - set(reported)
    one, other = (train_explained(*flags, *more, folder=name) for name, more in (("one", []), ("other", idle)))
    kept = [
        [entry.get(name) for entry in state["log_history"] for name in ("loss", "eval_loss")]
        for state, _ in (one, other)
    ]
    assert kept[0] == kept[1] and sum(value is not None for value in kept[0]) >= 2
    for name in ("model.safetensors", "adapter_model.safetensors"):
        files = [Path(folder) / name for _, folder in (one, other)]
        if files[0].exists():
            assert files[0].read_bytes() == files[1].read_bytes()
