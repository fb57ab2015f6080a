"""Every check of the arguments that needs no model, and the defaults that depend on others."""

import datetime
import math
import os
import re
import time
from pathlib import Path

from utils.config.from_adapter import check_adapter, start_from_adapter, template_of_run
from utils.model.quantised import settle_base
from utils.runtime.errors import Problem, in_one_line, nearest, refusal
from utils.storage.weights import check_weight_files
from utils.template import template_dict, unknown_template

# task → the rows it is shown on; the sample of a task is made for the embedded tiny model
SAMPLE_DATA = {
    "pretrain": ("data/pretrain_data.jsonl", None),
    "sft": ("data/sft_data.jsonl", "data/sft_eval_data.jsonl"),
    "dpo_multi": ("data/dpo_multi_data.jsonl", "data/dpo_multi_eval_data.jsonl"),
    "dpo_single": ("data/dpo_single_data.jsonl", "data/dpo_single_eval_data.jsonl"),
}
KNOWN_TASKS = tuple(SAMPLE_DATA)


def resolve_defaults(common, values: dict, given: set[str], recipe: type) -> list[Problem]:
    """Fills in what depends on other values: task, sample data, run folder, evaluation, what a run goes on from.

    Returns:
        the problems with what it goes on from.
    """
    common.task_type = common.task_type or recipe.task_types[0]
    sample, eval_sample = SAMPLE_DATA.get(common.task_type, (None, None))
    if common.train_data_path is None and sample:
        common.train_data_path = sample
        if common.task_type == "pretrain" and "allow_special_tokens_in_content" not in given:
            common.allow_special_tokens_in_content = True  # some of the sample's texts are chats, written out
        if common.eval_data_path is None and not common.val_size:
            common.eval_data_path = eval_sample
    if not values.get("output_dir"):
        values["output_dir"] = new_folder(f"output/{common.task_type}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not (common.eval_data_path or common.val_size) and "eval_strategy" not in given:
        values["eval_strategy"] = "no"
    resume = str(values.get("resume_from_checkpoint")).lower()
    if resume in ("true", "false", "none"):
        values["resume_from_checkpoint"] = True if resume == "true" else None
    if "max_prompt_length" not in given:
        common.max_prompt_length = min(common.max_prompt_length, max(1, common.max_len // 2))
    problems = start_from_adapter(common, given) if common.adapter_name_or_path else []
    template_of_run(common, given)
    return problems + settle_base(common)


def new_folder(path: str) -> str:
    """A name that no folder has: `output/sft-20260101-000000` → the same, or with `_2`, `_3` … after it."""
    found, number = path, 2
    while Path(found).exists():
        found, number = f"{path}_{number}", number + 1
    return found


def is_default_folder(path: str) -> bool:
    """Whether a run's folder was named by its time, so that no other run may have it."""
    return re.fullmatch(r"output/[a-z_]+-\d{8}-\d{6}(_\d+)?", path) is not None


def check_common(common, recipe: type, needs_weights: bool = True) -> list[Problem]:
    """Checks the common arguments against each other and against the disk.

    Args:
        needs_weights: whether the base must have weights beside its config.json.

    Returns:
        the problems, each with its value, what is allowed and the remedy.
    """
    problems = []
    if common.task_type not in recipe.task_types:
        problems += refusal(
            f"--task_type {common.task_type} does not fit the recipe {common.train_args_path!r}, which is for "
            f"{', '.join(recipe.task_types)}; choose another --train_args_path",
            "task_type",
            "train_args_path",
        )
    if common.template_name not in (*template_dict, "auto"):
        problems.append(unknown_template(common.template_name))
    problems += check_model_path(
        "--model_name_or_path", common.model_name_or_path, common.trust_remote_code, needs_weights=needs_weights
    )
    return problems + _check_numbers(common) + check_adapter(common)


def check_model_path(
    name: str, path: str, trust_remote_code: bool, adapter_allowed: bool = False, needs_weights: bool = True
) -> list[Problem]:
    """Checks that a path is a hub's name or a folder with a model.

    Args:
        name: the flag it came by.
        path: its value.
        trust_remote_code: whether Python code beside the model may run.
        adapter_allowed: whether a folder with an adapter will do.
        needs_weights: whether config.json alone will not.

    Returns:
        the problems.
    """
    flag = f"{name} {path!r}"
    folder = Path(path).expanduser()
    try:
        os.listdir(folder)
        (folder / "config.json").is_file()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a folder that may not be entered, a name that is too long
        return refusal(
            f"{flag} cannot be read: {error.strerror}; choose another folder, or have its owner allow it", *_flags(name)
        )
    if folder.is_file():
        return refusal(f"{flag} is a file; give the folder it lies in", *_flags(name))
    if folder.is_dir():
        if adapter_allowed and (folder / "adapter_config.json").is_file():
            return []
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                return refusal(
                    f"{flag} has no config.json: it holds an adapter; give it as --adapter_name_or_path",
                    *_flags(name),
                    "adapter_name_or_path",
                )
            return refusal(f"{flag} has no config.json: it holds no model saved by transformers", *_flags(name))
        if not needs_weights:
            return _check_config(name, path, trust_remote_code)
        if not list(folder.glob("*.safetensors")):
            return refusal(
                f"{flag} has no *.safetensors weights. Other weight files can run code when they are read and are not "
                "loaded; convert them with save_pretrained(...) of transformers",
                *_flags(name),
            )
        return _check_config(name, path, trust_remote_code) or check_weight_files(flag, folder, *_flags(name))
    return _check_name(name, path, folder.parent)


def _flags(name: str) -> list[str]:
    """The flag of a name as messages have it: `"--model_path"` → `["model_path"]`, `"the base"` → `[]`."""
    return [name.removeprefix("--")] if name.startswith("--") else []


def _check_name(name: str, path: str, parent: Path) -> list[Problem]:
    """Whether a path where nothing lies can be a hub's name."""
    looks_local = (
        path.startswith((".", "/", "~", "\\")) or path.count("/") != 1 or parent.is_dir() or parent.name == "output"
    )
    if looks_local or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        siblings = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        return refusal(
            f"{name} {path!r} does not exist.{nearest(path, siblings)} Give a model folder, or a hub name like "
            "Qwen/Qwen1.5-7B",
            *_flags(name),
        )
    return []


def _check_config(name: str, path: str, trust_remote_code: bool) -> list[Problem]:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # each model's code raises its own
        reason = in_one_line(error, 300)
        return refusal(
            f"{name} {path!r} has a config.json that cannot be used: {type(error).__name__}: {reason}. A model with "
            "code of its own needs --trust_remote_code true",
            *_flags(name),
            "trust_remote_code",
        )
    return []


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
