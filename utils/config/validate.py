"""Checks of the arguments that change nothing: numbers, data files, attention, reports."""

import datetime
import math
import os
import re
from importlib.util import find_spec

from utils.data.columns import parse_columns
from utils.data.files import find_files
from utils.data.sources import gives_settings, is_mixture
from utils.runtime.errors import Problem, nearest, refusal

MAX_EPOCHS = 1_000_000
# what transformers' TrainingArguments reads of --fsdp_config
_FSDP_KEYS = {
    "version", "auto_wrap_policy", "min_num_params", "transformer_layer_cls_to_wrap", "reshard_after_forward",
    "cpu_offload", "cpu_ram_efficient_loading", "state_dict_type", "activation_checkpointing", "forward_prefetch",
    "backward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers", "xla", "xla_fsdp_v2",
    "xla_fsdp_settings", "xla_fsdp_grad_ckpt",
}  # fmt: skip
# field of the trainer's → the least value allowed
_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "weight_decay": 0,
    "seed": 0,
    "dataloader_num_workers": 0,
    "logging_steps": 1e-9,
    "save_steps": 1e-9,
    "label_smoothing_factor": 0,
}


def validate(settings) -> list[Problem]:
    """Checks what would fail only after the weights are loaded, or be silently ignored."""
    common, train_args = settings.common, settings.train_args
    problems = _check_numbers(common) + _check_data_files(settings) + _check_columns(settings)
    problems += _check_attention(common) + _check_row_ledger(settings) + _check_train_on(common)
    problems += _check_parallelism()
    if train_args is None:  # `trainer_args` could not build them and has reported why
        return problems
    problems += _check_trainer_numbers(train_args) + _check_liger(train_args)
    problems += _check_reports(train_args) + _check_fsdp(train_args)
    if getattr(train_args, "packing", False) and not getattr(train_args, "padding_free", False):
        problems += refusal(
            "--packing true needs --padding_free true: only positions keep the rows within a row apart",
            "packing",
            "padding_free",
        )
    return problems


def _check_data_files(settings) -> list[Problem]:
    if settings.task is None:  # reported by `defaults`
        return []
    problems = []
    for name in ("train_data_path", "eval_data_path"):
        path = getattr(settings.common, name)
        if path and name == "eval_data_path" and gives_settings(path):
            problems += refusal(
                f"--eval_data_path {path!r}: weights and YAML files are for --train_data_path only; give files, "
                "folders and globs, separated by commas",
                name,
            )
        elif path and not (name == "train_data_path" and is_mixture(settings.common)):  # checked by `mixing`
            problems += find_files(path, f"--{name}", settings.task.file_suffixes)[1]
    return problems


def _check_columns(settings) -> list[Problem]:
    columns, problems = parse_columns(settings.common.columns)
    known = settings.task.row_type.known_fields if settings.task else ()
    for name in columns:
        if known and name not in known:
            rows = settings.task.row_type.name
            hint = " The name in a format comes first." if columns[name] in known else nearest(name, known)
            problems += refusal(
                f"--columns names {name!r}, a field that no format of a {rows} has.{hint} The formats are in "
                "docs/data.md",
                "columns",
            )
    return problems


def _check_row_ledger(settings) -> list[Problem]:
    task = settings.task
    if not settings.common.row_ledger or task is None or task.notes_row_losses:
        return []
    allowed = ", ".join(name for name in settings.tasks if settings.tasks[name].notes_row_losses)
    return refusal(
        f"--row_ledger true is not supported with --task_type {task.name}, whose trainer does not give the loss of "
        f"each row; leave it out, or use one of {allowed}",
        "row_ledger",
        "task_type",
    )


def _check_train_on(common) -> list[Problem]:
    if re.fullmatch(r"all_turns|last_turn|prompt|last_n:[1-9]\d*", common.train_on):
        return []
    return refusal(
        f"--train_on {common.train_on!r} is not allowed; give all_turns, last_turn, prompt, or last_n: with a number, "
        "as last_n:2",
        "train_on",
    )


def _check_attention(common) -> list[Problem]:
    from transformers.utils import is_flash_attn_2_available

    if common.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        return refusal(
            "--attn_implementation flash_attention_2 needs the flash-attn package and a GPU; use auto or sdpa",
            "attn_implementation",
        )
    return []


def _check_parallelism() -> list[Problem]:
    """Refuses ranks that share a row, which accelerate's launcher sets: here every process has rows of its own."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return []
    kinds = {"sp": "sequence", "cp": "context", "tp": "tensor"}
    sizes = {kind: os.environ.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "1") for kind in kinds}
    return [
        Problem(
            f"accelerate's parallelism_config_{kind}_size {size}: {kinds[kind]} parallelism is not supported; leave it "
            "out, and shard the weights with FSDP2 or ZeRO-3"
        )
        for kind, size in sizes.items()
        if size != "1"
    ]


def _check_fsdp(train_args) -> list[Problem]:
    """Refuses what transformers 5.23 ignores: unknown keys, and versions other than 1, which it reads as 1."""
    config = train_args.fsdp_config if train_args.fsdp and isinstance(train_args.fsdp_config, dict) else {}
    problems = [
        Problem(f"--fsdp_config has an unknown key {key!r}.{nearest(key, _FSDP_KEYS)}", flags=("fsdp_config",))
        for key in sorted(config.keys() - _FSDP_KEYS)
    ]
    if (version := str(config.get("version", 2))) not in ("1", "2"):
        problems += refusal(f"--fsdp_config has version {version}; give 2, or leave it out", "fsdp_config")
    if config.get("state_dict_type", "FULL_STATE_DICT") != "FULL_STATE_DICT":  # transformers would save no weights
        problems += refusal(
            f"--fsdp_config has state_dict_type {config['state_dict_type']}, of which the run's folder would get no "
            "weights; give FULL_STATE_DICT, or leave it out",
            "fsdp_config",
        )
    return problems


def _check_trainer_numbers(train_args) -> list[Problem]:
    problems = [
        Problem(f"--{name} {getattr(train_args, name)} is not allowed; give at least {minimum:.0g}", flags=(name,))
        for name, minimum in _AT_LEAST.items()
        if not minimum <= getattr(train_args, name) < math.inf
    ]
    for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
        if not 0 <= getattr(train_args, name) < 1:
            problems += refusal(
                f"--{name} {getattr(train_args, name)} is not allowed; give at least 0 and below 1", name
            )
    epochs = train_args.num_train_epochs
    if train_args.max_steps <= 0 and not 0 < epochs <= MAX_EPOCHS:
        wrong = "never ends" if epochs > 0 else "trains nothing"
        problems += refusal(
            f"--num_train_epochs {epochs} {wrong}; give a number above 0 and at most {MAX_EPOCHS:,}",
            "num_train_epochs",
        )
    return problems


def _check_liger(train_args) -> list[Problem]:
    import torch

    if not train_args.use_liger_kernel:
        return []
    if find_spec("liger_kernel") is None:
        return refusal(
            "--use_liger_kernel true needs the package liger-kernel, which is not installed; leave it out",
            "use_liger_kernel",
        )
    if not torch.accelerator.is_available():
        return refusal("--use_liger_kernel true needs a GPU, and there is none here; leave it out", "use_liger_kernel")
    return []


def _check_reports(train_args) -> list[Problem]:
    """Whether every tracker of `--report_to` is installed."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    problems, available = [], get_available_reporting_integrations()
    # alone, TrainingArguments has replaced them by a list of trackers
    exclusive = {"none", "all"} & set(train_args.report_to)
    if exclusive:
        problems += refusal(
            f"--report_to {' '.join(train_args.report_to)}: {exclusive.pop()!r} cannot be combined with others; leave "
            "it out",
            "report_to",
        )
    for name in dict.fromkeys(name for name in train_args.report_to if name not in ("none", "all")):
        if name in INTEGRATION_TO_CALLBACK and name not in available:
            problems += refusal(
                f"--report_to {name!r} needs a package that is not installed; install it (pip install {name}), or give "
                f"one of {', '.join(available)}, none",
                "report_to",
            )
        elif name not in available:
            problems += refusal(
                f"--report_to {name!r} is not installed.{nearest(name, available)} "
                f"Allowed here: none, {', '.join(available)}",
                "report_to",
            )
    return problems


def _check_numbers(common) -> list[Problem]:
    rules = [
        ("max_len", common.max_len >= 2, "a whole number of at least 2"),
        ("max_prompt_length", common.max_prompt_length >= 1, "a whole number of at least 1"),
        ("card_samples", common.card_samples >= 0, "0 or more"),
        ("lora_rank", common.lora_rank >= 1, "a whole number of at least 1"),
        ("lora_alpha", common.lora_alpha > 0 and math.isfinite(common.lora_alpha), "a number above 0"),
        ("lora_dropout", 0 <= common.lora_dropout < 1, "at least 0 and below 1"),
        (
            "val_size",
            common.val_size >= 0 and (common.val_size < 1 or common.val_size.is_integer()),
            "a share below 1 or a number of rows",
        ),
        ("loraplus_lr_ratio", common.loraplus_lr_ratio is None or common.loraplus_lr_ratio > 0, "a number above 0"),
        (
            "layerwise_lr_decay",
            common.layerwise_lr_decay is None or 0 < common.layerwise_lr_decay <= 1,
            "a number above 0 and at most 1",
        ),
    ]
    problems = [
        Problem(f"--{name} {getattr(common, name)} is not allowed; give {allowed}", flags=(name,))
        for name, ok, allowed in rules
        if not ok
    ]
    if common.template_date is not None and not _is_date(common.template_date):
        problems += refusal(
            f"--template_date {common.template_date!r} is not allowed; give a day as 2026-01-31", "template_date"
        )
    if common.eval_data_path and common.val_size:
        problems += refusal(
            f"--eval_data_path and --val_size {common.val_size} both name a validation part; give one",
            "eval_data_path",
            "val_size",
        )
    return problems


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
