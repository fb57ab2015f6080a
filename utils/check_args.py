"""Every check of the arguments that needs no model, and the defaults that depend on others."""

import math
import os
import re
import tempfile
import time
from pathlib import Path

from utils.errors import nearest
from utils.template import template_dict, unknown_template

# task → the rows it is shown on; the sample of a task is made for the embedded tiny model
SAMPLE_DATA = {
    "pretrain": ("data/pretrain_data.jsonl", None),
    "sft": ("data/sft_data.jsonl", "data/sft_eval_data.jsonl"),
}
FINISHED = "train_args.json"  # written last: a folder that has it holds a finished run


def resolve_defaults(common, values: dict, given: set[str], recipe: type) -> None:
    """Fills in what depends on other values: task, sample data, run folder, evaluation."""
    common.task_type = common.task_type or recipe.task_types[0]
    sample, eval_sample = SAMPLE_DATA.get(common.task_type, (None, None))
    if common.train_data_path is None and sample:
        common.train_data_path = sample
        if common.eval_data_path is None and not common.val_size:
            common.eval_data_path = eval_sample
    if not values.get("output_dir"):
        values["output_dir"] = f"output/{common.task_type}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not (common.eval_data_path or common.val_size) and "eval_strategy" not in given:
        values["eval_strategy"] = "no"
    if values.get("resume_from_checkpoint") in ("true", "True"):
        values["resume_from_checkpoint"] = True


def check_common(common, recipe: type) -> list[str]:
    """Checks the common arguments against each other and against the disk.

    Returns:
        the problems, each with its value, what is allowed and the remedy.
    """
    problems = []
    if common.task_type not in recipe.task_types:
        problems.append(
            f"--task_type {common.task_type} does not fit the recipe {common.train_args_path!r}, which is for "
            f"{', '.join(recipe.task_types)}; choose another --train_args_path"
        )
    if common.template_name not in (*template_dict, "auto"):
        problems.append(unknown_template(common.template_name))
    problems += _check_model_path(common.model_name_or_path, common.trust_remote_code)
    return problems + _check_numbers(common) + _check_adapter(common)


def check_together(common, train_args) -> list[str]:
    """Checks the common arguments and the recipe's against each other; returns the problems."""
    problems = _check_evaluation(common, train_args) + _check_output_dir(common, train_args)
    problems += _check_trainer(train_args)
    if common.cache_dir is not None:
        problems += _check_writable(f"--cache_dir {common.cache_dir!r}", Path(common.cache_dir).expanduser())
    if train_args.packing and not train_args.padding_free:
        problems.append("--packing true needs --padding_free true: only positions keep the rows within a row apart")
    if train_args.packing and common.trust_remote_code:
        problems.append(
            "--packing true does not go with --trust_remote_code true, whose attention may not heed "
            "positions; use --packing false"
        )
    return problems


def _check_model_path(path: str, trust_remote_code: bool) -> list[str]:
    flag = f"--model_name_or_path {path!r}"
    folder = Path(path).expanduser()
    if folder.is_file():
        return [f"{flag} is a file; give the folder it lies in"]
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = (
                "an adapter, whose base model is to be given"
                if (folder / "adapter_config.json").is_file()
                else ("no model saved by transformers")
            )
            return [f"{flag} has no config.json: it holds {hint}"]
        if not list(folder.glob("*.safetensors")):
            return [
                f"{flag} has no *.safetensors weights. Other weight files can run code when they are read and are not "
                "loaded; convert them with save_pretrained(...) of transformers"
            ]
        return _check_config(flag, path, trust_remote_code)
    parent = folder.parent
    looks_local = path.startswith((".", "/", "~", "\\")) or path.count("/") != 1 or parent.is_dir()
    if looks_local or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        siblings = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        return [
            f"{flag} does not exist.{nearest(path, siblings)} Give a model folder, or a hub name like Qwen/Qwen1.5-7B"
        ]
    return []


def _check_config(flag: str, path: str, trust_remote_code: bool) -> list[str]:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # each model's code raises its own
        reason = " ".join(str(error).split())[:300]
        return [
            f"{flag} has a config.json that cannot be used: {type(error).__name__}: {reason}. A model with code "
            "of its own needs --trust_remote_code true"
        ]
    return []


def _check_numbers(common) -> list[str]:
    rules = [
        ("max_len", common.max_len >= 2, "a whole number of at least 2"),
        ("max_prompt_length", common.max_prompt_length >= 1, "a whole number of at least 1"),
        ("lora_rank", common.lora_rank >= 1, "a whole number of at least 1"),
        ("lora_alpha", common.lora_alpha > 0 and math.isfinite(common.lora_alpha), "a number above 0"),
        ("lora_dropout", 0 <= common.lora_dropout < 1, "at least 0 and below 1"),
        ("val_size", 0 <= common.val_size < 1 or common.val_size.is_integer(), "a share below 1 or a number of rows"),
        ("loraplus_lr_ratio", common.loraplus_lr_ratio is None or common.loraplus_lr_ratio > 0, "a number above 0"),
    ]
    problems = [
        f"--{name} {getattr(common, name)} is not allowed; give {allowed}" for name, ok, allowed in rules if not ok
    ]
    if common.eval_data_path and common.val_size:
        problems.append(f"--eval_data_path and --val_size {common.val_size} both name a validation part; give one")
    return problems


def _check_adapter(common) -> list[str]:
    problems = []
    if common.train_mode == "full":
        adapter_only = {
            "use_dora": common.use_dora,
            "use_rslora": common.use_rslora,
            "init_lora_weights": common.init_lora_weights != "default",
            "loraplus_lr_ratio": common.loraplus_lr_ratio is not None,
            "lora_target_modules": common.lora_target_modules is not None,
        }
        problems += [
            f"--{name} {getattr(common, name)} needs an adapter, and --train_mode full has none; "
            "use --train_mode lora or qlora, or leave the flag out"
            for name, is_set in adapter_only.items()
            if is_set
        ]
    if common.init_lora_weights == "pissa":
        if common.train_mode == "qlora":
            problems.append(
                "--init_lora_weights pissa takes the base's weights apart, which --train_mode qlora has "
                "quantised; use --train_mode lora"
            )
        if common.use_dora:
            problems.append("--init_lora_weights pissa and --use_dora true both change how an adapter starts; give one")
    return problems


def _check_evaluation(common, train_args) -> list[str]:
    wanted = train_args.eval_strategy != "no" or train_args.load_best_model_at_end
    if wanted and not (common.eval_data_path or common.val_size):
        return [
            "evaluation is asked for (--eval_strategy, --load_best_model_at_end) without rows for it; "
            "give --eval_data_path or --val_size"
        ]
    return []


def _check_trainer(train_args) -> list[str]:
    """The trainer's figures that would only fail, or do nothing, once it runs."""
    from transformers.integrations import get_available_reporting_integrations

    least = [
        ("per_device_train_batch_size", 1),
        ("per_device_eval_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("learning_rate", 0),
        ("warmup_steps", 0),
    ]
    problems = [
        f"--{name} {getattr(train_args, name)} is not allowed; give at least {minimum}"
        for name, minimum in least
        if getattr(train_args, name) < minimum
    ]
    if train_args.max_steps <= 0 and train_args.num_train_epochs <= 0:
        problems.append(f"--num_train_epochs {train_args.num_train_epochs} trains nothing; give a number above 0")
    available = get_available_reporting_integrations()
    for name in train_args.report_to:
        if name not in available:
            problems.append(
                f"--report_to {name!r} is not installed.{nearest(name, available)} "
                f"Allowed here: none, {', '.join(available)}"
            )
    return problems


def _check_output_dir(common, train_args) -> list[str]:
    folder = Path(train_args.output_dir)
    flag = f"--output_dir {train_args.output_dir!r}"
    resume = train_args.resume_from_checkpoint
    if isinstance(resume, str) and not (Path(resume) / "trainer_state.json").is_file():
        return [f"--resume_from_checkpoint {resume!r} is not a checkpoint; give a checkpoint-N folder, or true"]
    if resume is True and not list(folder.glob("checkpoint-*")):
        return [f"--resume_from_checkpoint true: {flag} holds no checkpoint; leave the flag out to start anew"]
    if folder.exists() and not folder.is_dir():
        return [f"{flag} is a file; give a folder"]
    if (folder / FINISHED).exists() and not (common.overwrite_output_dir or resume):
        return [
            f"{flag} already holds a finished run; give another folder, --overwrite_output_dir true to replace it, "
            "or --resume_from_checkpoint true to go on with it"
        ]
    return _check_writable(flag, folder)


def _check_writable(flag: str, folder: Path) -> list[str]:
    existing = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
    try:
        # only a real attempt tells: permissions, a read-only disk, a full one
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        return [f"{flag} cannot be written: {os.strerror(error.errno or 0)} ({existing}); give another folder"]
    return []
