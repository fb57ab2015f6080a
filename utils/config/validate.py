"""Checks of a run as a whole: its data files, its folder, its checkpoint, the trainer's figures."""

import math
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from utils.data.files import SUFFIXES, TEXT_SUFFIXES, find_files
from utils.runtime.errors import Problem, nearest, refusal
from utils.storage.pickles import check_pickles
from utils.storage.run_files import WRITTEN, foreign_files
from utils.storage.run_folder import (
    RECORD_FILE,
    checkpoints_after,
    checkpoints_of,
    has_optimizer,
    is_removable,
    is_truncated,
    new_run_remedy,
    read_manifest,
)  # fmt: skip
from utils.storage.run_lock import in_use_message, lock_holder, run_lock_path

MOST_EPOCHS = 1_000_000


def check_together(common, train_args) -> list[Problem]:
    """Checks the common arguments and the recipe's against each other; returns the problems."""
    problems = check_output_dir(common, train_args)
    problems += _check_data_files(common) + _check_attention(common)
    problems += _check_trainer(train_args) + _check_optimizer(train_args)
    if common.cache_dir is not None:
        problems += _check_writable("cache_dir", common.cache_dir, Path(common.cache_dir).expanduser())
    packing = getattr(train_args, "packing", False)
    if packing and not train_args.padding_free:
        problems += refusal(
            "--packing true needs --padding_free true: only positions keep the rows within a row apart",
            "packing",
            "padding_free",
        )
    return problems


def _check_data_files(common) -> list[Problem]:
    suffixes = TEXT_SUFFIXES if common.task_type == "pretrain" else SUFFIXES
    problems = []
    for name in ("train_data_path", "eval_data_path"):
        if getattr(common, name):
            problems += find_files(getattr(common, name), f"--{name}", suffixes)[1]
    return problems


def _check_attention(common) -> list[Problem]:
    from transformers.utils import is_flash_attn_2_available

    if common.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        return refusal(
            "--attn_implementation flash_attention_2 needs the flash-attn package and a GPU; use auto or sdpa",
            "attn_implementation",
        )
    return []


def _check_optimizer(train_args) -> list[Problem]:
    """The trainer builds optimizer and schedule long after the model is loaded; here on a single weight."""
    import torch
    from transformers import Trainer, get_scheduler

    problems = []
    try:
        Trainer.get_optimizer_cls_and_kwargs(train_args)
    except ImportError as error:
        problems += refusal(f"--optim {train_args.optim.value} cannot be used: {error}", "optim")
    except ValueError:
        pass  # some ask for the model, which is not there yet
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    options = train_args.lr_scheduler_kwargs or None
    try:
        get_scheduler(train_args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=options)
    except (ValueError, TypeError, AttributeError) as error:
        problems += refusal(
            f"--lr_scheduler_type {train_args.lr_scheduler_type.value} cannot be used with --lr_scheduler_kwargs "
            f"{options}: {error}",
            "lr_scheduler_type",
            "lr_scheduler_kwargs",
        )
    return problems


def _check_trainer(train_args) -> list[Problem]:
    """The trainer's figures that would only fail, or do nothing, once it runs."""
    import torch
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    least = [
        ("per_device_train_batch_size", 1),
        ("per_device_eval_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("learning_rate", 0),
        ("warmup_steps", 0),
        ("max_grad_norm", 0),
        ("weight_decay", 0),
        ("seed", 0),
        ("dataloader_num_workers", 0),
        ("logging_steps", 1e-9),
        ("save_steps", 1e-9),
        ("label_smoothing_factor", 0),
    ]
    problems = [
        Problem(f"--{name} {getattr(train_args, name)} is not allowed; give at least {minimum:.0g}", flags=(name,))
        for name, minimum in least
        if not minimum <= getattr(train_args, name) < math.inf
    ]
    for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
        if not 0 <= getattr(train_args, name) < 1:
            problems += refusal(
                f"--{name} {getattr(train_args, name)} is not allowed; give at least 0 and below 1", name
            )
    epochs = train_args.num_train_epochs
    if train_args.max_steps <= 0 and not 0 < epochs <= MOST_EPOCHS:
        wrong = "never ends" if epochs > 0 else "trains nothing"
        problems += refusal(
            f"--num_train_epochs {epochs} {wrong}; give a number above 0 and at most {MOST_EPOCHS:,}",
            "num_train_epochs",
        )
    if train_args.use_liger_kernel and find_spec("liger_kernel") is None:
        problems += refusal(
            "--use_liger_kernel true needs the package liger-kernel, which is not installed; leave it out",
            "use_liger_kernel",
        )
    elif train_args.use_liger_kernel and not torch.accelerator.is_available():
        problems += refusal(
            "--use_liger_kernel true needs a GPU, and there is none here; leave it out", "use_liger_kernel"
        )
    available = get_available_reporting_integrations()
    alone = {"none", "all"} & set(train_args.report_to)
    if alone:  # by itself it is a list of others by now
        problems += refusal(
            f"--report_to {' '.join(train_args.report_to)}: {alone.pop()!r} goes with no other; leave it out",
            "report_to",
        )
    for name in dict.fromkeys(name for name in train_args.report_to if name not in alone):
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


def check_output_dir(common, train_args) -> list[Problem]:
    """Whether a run may write into its folder, and whether there is what it is to go on from; returns the problems."""
    folder = Path(train_args.output_dir)
    flag = f"--output_dir {train_args.output_dir!r}"
    if folder.is_symlink() and not folder.exists():
        return refusal(
            f"{flag} is a symbolic link to {os.readlink(folder)!r}, which is not there; give another folder",
            "output_dir",
        )
    if folder.exists() and not folder.is_dir():
        return refusal(f"{flag} is a file; give a folder", "output_dir")
    if told := lock_holder(run_lock_path(folder)):
        return refusal(in_use_message(flag, told), "output_dir")
    for start in filter(None, (common.model_name_or_path, common.adapter_name_or_path)):
        start = Path(start).resolve()
        if folder.resolve() == start or (folder.resolve() in start.parents and "checkpoint-" in start.name):
            return refusal(
                f"{flag} is the folder that training starts from, or of its run; give another folder", "output_dir"
            )
    foreign = [path.name for path in folder.glob("checkpoint-*") if path not in checkpoints_of(folder)]
    if foreign:
        # transformers counts them among a run's checkpoints and deletes the oldest
        return refusal(
            f"{flag} holds {foreign[0]!r}, which the trainer would take for a checkpoint; move it or rename it",
            "output_dir",
        )
    own = True
    if train_args.resume_from_checkpoint:
        problems = _check_checkpoint(common, train_args, folder)
        if problems:
            return problems
        own = folder.resolve() in Path(train_args.resume_from_checkpoint).resolve().parents
    if not (train_args.resume_from_checkpoint and own) and not common.overwrite_output_dir:
        held = (
            "a finished run" if (folder / RECORD_FILE).exists() else "checkpoints" if checkpoints_of(folder) else None
        )
        written = [path.name for path in folder.glob("*") if path.name in WRITTEN or path.suffix == ".safetensors"]
        held = held or (f"{written[0]!r}" if written else None)
        if held:
            return refusal(
                f"{flag} already holds {held}; give another folder, --overwrite_output_dir true to replace it, "
                "or --resume_from_checkpoint true to go on with it",
                "output_dir",
                "overwrite_output_dir",
                "resume_from_checkpoint",
            )
    if not (train_args.resume_from_checkpoint and own) and (foreign := foreign_files(folder)):
        return refusal(
            f"{flag} holds {foreign[0]!r}, which no run of this project wrote, or which was changed since, and "
            "--overwrite_output_dir true replaces nothing but what a run wrote; move it away, or give another folder",
            "output_dir",
            "overwrite_output_dir",
        )
    return _check_writable("output_dir", train_args.output_dir, folder)


def _check_checkpoint(common, train_args, folder: Path) -> list[Problem]:
    """Finds the newest whole checkpoint for `true`, and checks that it is of this kind of training."""
    resume = train_args.resume_from_checkpoint
    candidates = [Path(resume)] if isinstance(resume, str) else checkpoints_of(folder)
    whole = [path for path in candidates if read_manifest(path) is not None]
    if not whole and isinstance(resume, str):
        return refusal(
            f"--resume_from_checkpoint {resume!r} is not a checkpoint; give a checkpoint-N folder, or true",
            "resume_from_checkpoint",
        )
    if not whole:
        return refusal(
            f"--resume_from_checkpoint true: --output_dir {str(folder)!r} holds no checkpoint that was written to its "
            "end; give the folder of the run, or leave the flag out to start anew (--overwrite_output_dir true there)",
            "resume_from_checkpoint",
            "output_dir",
            "overwrite_output_dir",
        )
    train_args.resume_from_checkpoint = str(whole[-1])
    if common.template_date is None:  # of the rows that were trained on before
        common.template_date = read_manifest(whole[-1])["settings"].get("must", {}).get("template_date")
    if not has_optimizer(whole[-1]):
        return refusal(
            f"--resume_from_checkpoint {str(whole[-1])!r} holds weights alone (--save_only_model true), so optimizer "
            f"and schedule would begin anew; {new_run_remedy(str(whole[-1]), common.train_mode)}",
            "resume_from_checkpoint",
            "save_only_model",
            "model_name_or_path" if common.train_mode == "full" else "adapter_name_or_path",
            "output_dir",
        )
    newer = checkpoints_after(str(whole[-1]), folder)
    if changed := [path.name for path in newer if not is_removable(path) and not is_truncated(path)]:
        return refusal(
            f"--output_dir {str(folder)!r} holds {changed[0]!r}, which is newer than the checkpoint to go on from "
            f"({whole[-1].name}), and which no run wrote or which was changed since, so it is not written over; move "
            "it away, or give another folder",
            "output_dir",
        )
    newer = [path for path in newer if is_removable(path)]
    if newer and not common.overwrite_output_dir:
        return refusal(
            f"--resume_from_checkpoint {str(whole[-1])!r} is older than {newer[-1].name} in --output_dir "
            f"{str(folder)!r}; give true to go on from the newest, --overwrite_output_dir true to remove the newer, "
            "or another folder",
            "resume_from_checkpoint",
            "output_dir",
            "overwrite_output_dir",
        )
    if foreign := check_pickles(whole[-1]):
        flags = ("resume_from_checkpoint", "model_name_or_path", "adapter_name_or_path")
        return [Problem(f"--resume_from_checkpoint {str(whole[-1])!r}: {problem}", flags=flags) for problem in foreign]
    config = whole[-1] / "adapter_config.json"
    if config.is_file() != (common.train_mode != "full"):
        kind = "an adapter" if config.is_file() else "whole weights"
        return refusal(
            f"--resume_from_checkpoint {str(whole[-1])!r} holds {kind}, which --train_mode {common.train_mode} does "
            "not train; give the train_mode it was made with",
            "resume_from_checkpoint",
            "train_mode",
        )
    return []


def _check_writable(flag: str, value: str, folder: Path) -> list[Problem]:
    existing = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
    try:
        # only a real attempt tells: permissions, a read-only disk, a full one
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        return refusal(f"--{flag} {value!r} cannot be written: {reason} ({existing}); give another folder", flag)
    return []
