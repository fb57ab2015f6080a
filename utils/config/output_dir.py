"""Checks whether a run may write into its folder, and finds the checkpoint that it resumes from."""

import os
from pathlib import Path

from utils.model.adapter import adapter_of
from utils.runtime.errors import Problem, refusal
from utils.storage.files import write_refusal
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
)
from utils.storage.run_lock import in_use_message, lock_holder, run_lock_path


def resolve(settings) -> None:
    """Sets `resume_from_checkpoint` to the newest complete checkpoint for `true`, and that run's `template_date`."""
    common, train_args = settings.common, settings.train_args
    if not train_args.resume_from_checkpoint:
        return
    complete = _complete_checkpoints(train_args)
    if not complete:
        return
    train_args.resume_from_checkpoint = str(complete[-1])
    if common.template_date is None:  # the date that the rows were rendered with
        must_match = read_manifest(complete[-1])["settings"].get("must", {})
        common.template_date = must_match.get("template_date")


def validate(settings) -> list[Problem]:
    """Checks the run's folder, the checkpoint, and the folder of prepared rows."""
    common = settings.common
    problems = check_output_dir(common, settings.train_args)
    if common.cache_dir is not None:
        problems += _check_writable("cache_dir", common.cache_dir, Path(common.cache_dir).expanduser())
    return problems


def check_output_dir(common, train_args) -> list[Problem]:
    """Checks that a run may write into its folder and resume from its checkpoint; returns the problems."""
    folder = Path(train_args.output_dir)
    flag = f"--output_dir {train_args.output_dir!r}"
    if problems := _check_usable(common, flag, folder):
        return problems
    resumed_here = False
    if train_args.resume_from_checkpoint:
        problems = _check_checkpoint(common, train_args, folder)
        if problems:
            return problems
        resumed_here = folder.resolve() in Path(train_args.resume_from_checkpoint).resolve().parents
    if not resumed_here and (problems := _check_replaceable(common, flag, folder)):
        return problems
    return _check_writable("output_dir", train_args.output_dir, folder)


def _check_usable(common, flag: str, folder: Path) -> list[Problem]:
    """Whether the path is a folder that no other run uses, that this run does not start from."""
    if folder.is_symlink() and not folder.exists():
        return refusal(
            f"{flag} is a symbolic link to {os.readlink(folder)!r}, which does not exist; give another folder",
            "output_dir",
        )
    if folder.exists() and not folder.is_dir():
        return refusal(f"{flag} is a file; give a folder", "output_dir")
    if owner := lock_holder(run_lock_path(folder)):
        return refusal(in_use_message(flag, owner), "output_dir")
    for start in filter(None, (common.model_name_or_path, common.adapter_name_or_path)):
        start = Path(start).resolve()
        if folder.resolve() == start or (folder.resolve() in start.parents and "checkpoint-" in start.name):
            return refusal(
                f"{flag} is the folder that training starts from, or of its run; give another folder", "output_dir"
            )
    foreign = [path.name for path in folder.glob("checkpoint-*") if path not in checkpoints_of(folder)]
    if foreign:
        # transformers 5.23 counts them among a run's checkpoints and deletes the oldest
        return refusal(
            f"{flag} holds {foreign[0]!r}, which the trainer would take for a checkpoint; move it or rename it",
            "output_dir",
        )
    return []


def _check_replaceable(common, flag: str, folder: Path) -> list[Problem]:
    """Whether the folder is empty, or `--overwrite_output_dir` may replace all that it holds."""
    if not common.overwrite_output_dir:
        held = (
            "a finished run" if (folder / RECORD_FILE).exists() else "checkpoints" if checkpoints_of(folder) else None
        )
        written = [path.name for path in folder.glob("*") if path.name in WRITTEN or path.suffix == ".safetensors"]
        held = held or (f"{written[0]!r}" if written else None)
        if held:
            return refusal(
                f"{flag} already holds {held}; give another folder, --overwrite_output_dir true to replace it, "
                "or --resume_from_checkpoint true to resume it",
                "output_dir",
                "overwrite_output_dir",
                "resume_from_checkpoint",
            )
    if foreign := foreign_files(folder):
        return refusal(
            f"{flag} holds {foreign[0]!r}, which no run of this project wrote, or which was changed since, and "
            "--overwrite_output_dir true replaces only what a run wrote; move it away, or give another folder",
            "output_dir",
            "overwrite_output_dir",
        )
    return []


def _complete_checkpoints(train_args) -> list[Path]:
    """The checkpoint that `--resume_from_checkpoint` names, or those of the run; only complete ones."""
    resume = train_args.resume_from_checkpoint
    candidates = [Path(resume)] if isinstance(resume, str) else checkpoints_of(Path(train_args.output_dir))
    return [path for path in candidates if read_manifest(path) is not None]


def _check_checkpoint(common, train_args, folder: Path) -> list[Problem]:
    """Whether there is a complete checkpoint, with all that resuming needs, of this kind of training."""
    resume, complete = train_args.resume_from_checkpoint, _complete_checkpoints(train_args)
    if not complete and isinstance(resume, str):
        return refusal(
            f"--resume_from_checkpoint {resume!r} is not a checkpoint; give a checkpoint-N folder, or true",
            "resume_from_checkpoint",
        )
    if not complete:
        return refusal(
            f"--resume_from_checkpoint true: --output_dir {str(folder)!r} holds no complete checkpoint; give the "
            "folder of the run, or leave the flag out to start anew (with --overwrite_output_dir true)",
            "resume_from_checkpoint",
            "output_dir",
            "overwrite_output_dir",
        )
    checkpoint = complete[-1]
    return (
        _check_contents(common, checkpoint)
        or _check_newer(common, checkpoint, folder)
        or _check_kind(common, checkpoint)
    )


def _check_contents(common, checkpoint: Path) -> list[Problem]:
    if has_optimizer(checkpoint):
        return []
    return refusal(
        f"--resume_from_checkpoint {str(checkpoint)!r} holds weights alone (--save_only_model true), so optimizer "
        f"and schedule would start anew; {new_run_remedy(str(checkpoint), adapter_of(common).is_adapter)}",
        "resume_from_checkpoint",
        "save_only_model",
        "adapter_name_or_path" if adapter_of(common).is_adapter else "model_name_or_path",
        "output_dir",
    )


def _check_newer(common, checkpoint: Path, folder: Path) -> list[Problem]:
    """Checkpoints of later steps would be overwritten; that needs `--overwrite_output_dir`."""
    newer = checkpoints_after(str(checkpoint), folder)
    if changed := [path.name for path in newer if not is_removable(path) and not is_truncated(path)]:
        return refusal(
            f"--output_dir {str(folder)!r} holds {changed[0]!r}, which is newer than the checkpoint to resume from "
            f"({checkpoint.name}), and which no run wrote or which was changed since, so it is not overwritten; move "
            "it away, or give another folder",
            "output_dir",
        )
    newer = [path for path in newer if is_removable(path)]
    if newer and not common.overwrite_output_dir:
        return refusal(
            f"--resume_from_checkpoint {str(checkpoint)!r} is older than {newer[-1].name} in --output_dir "
            f"{str(folder)!r}; give true to resume from the newest, --overwrite_output_dir true to remove the newer, "
            "or another folder",
            "resume_from_checkpoint",
            "output_dir",
            "overwrite_output_dir",
        )
    return []


def _check_kind(common, checkpoint: Path) -> list[Problem]:
    """Whether its pickles are safe to load, and it holds what `--train_mode` trains."""
    if unsafe := check_pickles(checkpoint):
        flags = ("resume_from_checkpoint", "model_name_or_path", "adapter_name_or_path")
        return [Problem(f"--resume_from_checkpoint {str(checkpoint)!r}: {problem}", flags=flags) for problem in unsafe]
    has_adapter = (checkpoint / "adapter_config.json").is_file()
    if has_adapter != adapter_of(common).is_adapter:
        kind = "an adapter" if has_adapter else "full weights"
        return refusal(
            f"--resume_from_checkpoint {str(checkpoint)!r} holds {kind}, which --train_mode {common.train_mode} does "
            "not train; give the train_mode it was made with",
            "resume_from_checkpoint",
            "train_mode",
        )
    return []


def _check_writable(flag: str, value: str, folder: Path) -> list[Problem]:
    reason = write_refusal(folder)
    return refusal(f"--{flag} {value!r} cannot be written: {reason}; give another folder", flag) if reason else []
