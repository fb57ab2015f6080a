"""Defaults that depend on other values or on the machine: precision, task, sample data, run folder."""

import os
import time

from utils.model.source import made_folder
from utils.runtime.errors import Problem, UserError, refusal
from utils.storage.files import project_path
from utils.storage.run_folder import new_folder
from utils.template import template_dict, unknown_template
from utils.template.thinking import with_thinking


def resolve(settings) -> None:
    """Sets the precision, the task, its sample data and a new run folder where nothing else was given."""
    common, values, given = settings.common, settings.values, settings.given
    common.model_name_or_path = made_folder(project_path(os.path.expanduser(common.model_name_or_path)))
    _resolve_precision(settings)
    common.task_type = common.task_type or settings.recipe.task_types[0]
    settings.task = settings.tasks.get(common.task_type)
    _resolve_data(settings)
    if not values.get("output_dir"):
        values["output_dir"] = new_folder(f"output/{common.task_type}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not (common.eval_data_path or common.val_size) and "eval_strategy" not in given:
        values["eval_strategy"] = "no"
    resume = str(values.get("resume_from_checkpoint")).lower()
    if resume in ("true", "false", "none"):
        values["resume_from_checkpoint"] = True if resume == "true" else None
    if "max_prompt_length" not in given:
        common.max_prompt_length = min(common.max_prompt_length, max(1, common.max_len // 2))


def validate(settings) -> list[Problem]:
    """Checks the precision against the device, the task against the recipe, and that the template exists."""
    common, recipe = settings.common, settings.recipe
    problems = _precision_conflict(settings)
    precision = _requested_precision(settings)
    if precision == "bf16" and not device_has_bf16():
        problems += refusal(
            "bf16 was requested, which this device does not support; use --precision auto, fp16 (CUDA) or fp32",
            "precision",
        )
    if precision == "fp16" and not _has_cuda():
        problems += refusal(
            "fp16 was requested, which trains on a CUDA device only; use --precision auto, bf16 or fp32", "precision"
        )
    if common.task_type not in recipe.task_types:
        problems += refusal(
            f"--task_type {common.task_type} does not fit the recipe {common.train_args_path!r}, which is for "
            f"{', '.join(recipe.task_types)}; choose another --train_args_path",
            "task_type",
            "train_args_path",
        )
    if settings.needs_weights and settings.task is not None and common.train_data_path is None:
        problems += refusal(
            f"--train_data_path is missing, and the task {settings.task.name} has no sample data; give data files",
            "train_data_path",
        )
    if common.template_name not in (*template_dict, "auto"):
        problems.append(unknown_template(common.template_name))
    elif common.template_name != "auto" and settings.task is not None and settings.task.uses_template:
        problems += _check_thinking(common)
    return problems


def _check_thinking(common) -> list[Problem]:
    """Checks that a template of this project has the switch of `--thinking`."""
    try:
        with_thinking(template_dict[common.template_name], common.thinking)
    except UserError as error:
        return error.problems
    return []


def _resolve_data(settings) -> None:
    """The task's own sample where no data is given; it is made for the embedded tiny model."""
    common, task = settings.common, settings.task
    if common.train_data_path is not None or task is None:
        return
    common.train_data_path, eval_sample = task.sample_data
    for name, value in task.sample_settings.items():
        if name not in settings.given:
            setattr(common, name, value)
    if common.eval_data_path is None and not common.val_size:
        common.eval_data_path = eval_sample


# ---------------------------------------------------------------------- precision


def device_has_bf16() -> bool:
    """Whether this machine computes in bf16 natively rather than emulating it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return True
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _resolve_precision(settings) -> None:
    """Turns `--precision` into the trainer's `bf16`, `fp16` and `use_cpu`; fp32 where the device lacks it."""
    import torch

    values, precision = settings.values, _requested_precision(settings)
    if precision == "auto":
        precision = "bf16" if device_has_bf16() else "fp16" if _has_cuda() else "fp32"
    elif (precision == "bf16" and not device_has_bf16()) or (precision == "fp16" and not _has_cuda()):
        precision = "fp32"  # `validate` reports it
    settings.common.precision = precision
    values["bf16"], values["fp16"] = precision == "bf16", precision == "fp16"
    # TrainingArguments takes bf16 without a GPU only if use_cpu is set
    values["use_cpu"] = values.get("use_cpu") or not (_has_cuda() or torch.backends.mps.is_available())


def _is_set(settings, name: str) -> bool:
    """Whether a flag, the file of `--config` or the recipe sets `bf16` or `fp16`."""
    return name in settings.given or settings.recipe.__dict__.get(name) is not None


def _trainer_precisions(settings) -> list[str]:
    """Which of `--bf16` and `--fp16` are set to true."""
    return [name for name in ("bf16", "fp16") if _is_set(settings, name) and settings.requested[name]]


def _requested_precision(settings) -> str:
    """`--precision`, or what `--bf16` and `--fp16` make of it: `auto`, `bf16`, `fp16` or `fp32`."""
    precision, by_trainer = settings.requested["precision"], _trainer_precisions(settings)
    if _precision_conflict(settings):
        return precision
    if by_trainer:
        return by_trainer[0]
    no_bf16 = _is_set(settings, "bf16") and settings.requested["bf16"] is False
    return "fp32" if precision == "auto" and no_bf16 else precision


def _precision_conflict(settings) -> list[Problem]:
    """Whether `--precision`, `--bf16` and `--fp16` contradict each other."""
    precision, by_trainer = settings.requested["precision"], _trainer_precisions(settings)
    if "precision" in settings.given and by_trainer and precision not in ("auto", by_trainer[0]):
        return refusal(
            f"--precision {precision} contradicts --{by_trainer[0]} true; give one of them",
            "precision",
            by_trainer[0],
        )
    if _is_set(settings, "bf16") and settings.requested["bf16"] is False and precision == "bf16":
        return refusal("--precision bf16 contradicts --bf16 false; give one of them", "precision", "bf16")
    if len(by_trainer) == 2:
        return refusal("--bf16 true contradicts --fp16 true; give one of them", "bf16", "fp16")
    return []
