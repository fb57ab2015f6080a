"""Whether a checkpoint belongs to this run: the same base, adapter, rows and format."""

import dataclasses
import hashlib
from pathlib import Path

from loguru import logger

from utils import weight_files
from utils.check_deepspeed import zero_stage
from utils.checkpoints import read_manifest
from utils.errors import UserError
from utils.launch import world_size

# a checkpoint made with another of these is a checkpoint of another model
_SAME = (
    "task_type", "train_mode", "template_name", "template_date", "max_len", "max_prompt_length", "train_on", "use_dora", "lora_rank",
    "lora_alpha", "lora_target_modules", "use_rslora", "init_lora_weights", "train_special_tokens", "val_size",
)  # fmt: skip
# with another value of the recipe's it can be gone on from, but the steps to come are not those of the undisturbed run;
# these say only how and where a run computes, writes and shows, or are compared above
_MAY_DIFFER = (
    "output_dir", "resume_from_checkpoint", "run_name", "project", "report_to", "deepspeed", "deepspeed_plugin",
    "optim", "disable_tqdm", "do_train", "do_eval", "do_predict", "local_rank", "per_device_eval_batch_size",
    "bf16", "fp16", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "debug",
)  # fmt: skip
_MAY_DIFFER_BY_NAME = (
    "log", "save_", "eval_", "hub_", "push_to_hub", "trackio", "dataset_", "include_", "skip_memory", "batch_eval",
    "prediction_loss", "dataloader_num", "dataloader_p", "dataloader_m", "ddp_", "precompute", "gradient_checkpointing",
    "activation_", "torch_empty", "enable_jit", "restore_callback",
)  # fmt: skip


def run_settings(args, train_args, data) -> dict:
    """What a run that goes on from a checkpoint must have in common with the one that made it.

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument.
        data: the prepared rows.
    """
    common = dataclasses.asdict(args)
    must = {name: common[name] for name in _SAME}
    must["the base model"] = fingerprint(args.model_name_or_path)
    must["the adapter to start from"] = args.adapter_name_or_path and fingerprint(args.adapter_name_or_path)
    must["optim"] = str(train_args.optim)
    must["loraplus_lr_ratio"] = args.loraplus_lr_ratio
    must["the seed that held rows back"] = train_args.seed if args.val_size else None
    stage = zero_stage(train_args)
    zero = train_args.deepspeed_plugin is not None
    must["DeepSpeed"] = f"ZeRO-{stage} on {world_size()} processes" if zero else None
    must["the training rows"] = data.report.key[:12]
    recipe = [field.name for field in dataclasses.fields(train_args) if field.init]
    counts = [name for name in recipe if name not in _MAY_DIFFER and not name.startswith(_MAY_DIFFER_BY_NAME)]
    should = {name: str(getattr(train_args, name)) for name in counts}
    should |= {"processes": str(world_size()), "lora_dropout": str(args.lora_dropout), "precision": args.precision}
    return {"must": must, "should": should}


def fingerprint(path: str) -> str:
    """A short hash of a model folder's settings and weights; a hub's name as it is."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256(str(weight_files.fingerprint(folder)).encode())
    for file in sorted(folder.glob("*config.json")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def check_resume(args, train_args, data) -> list[dict]:
    """Refuses a checkpoint of another model, adapter or other rows, before any weights load.

    Returns:
        what is noted of the resuming, `[{"from": "output/sft/checkpoint-12", "changed": {"seed": ["42", "7"]}}]`;
        empty for a run from the start.

    Raises:
        UserError: with every difference, then and now.
    """
    checkpoint = train_args.resume_from_checkpoint
    manifest = read_manifest(Path(checkpoint)) if checkpoint else None
    if manifest is None:
        return []
    then, now = manifest["settings"], run_settings(args, train_args, data)
    different = [
        f"--resume_from_checkpoint {checkpoint!r} was made with {name} {then['must'].get(name)}, now: {value}. "
        "Give the same, or train anew in another --output_dir"
        for name, value in now["must"].items()
        if str(then["must"].get(name)) != str(value)
    ]
    if different:
        raise UserError(*different)
    changed = {
        name: [then["should"][name], value]
        for name, value in now["should"].items()
        if then["should"].get(name, value) != value
    }
    for name, (before, value) in changed.items():
        logger.warning("resuming with {} {}, it was {}: the steps to come will differ", name, value, before)
    if str(train_args.train_sampling_strategy) == "group_by_length":
        logger.warning(
            "resuming with train_sampling_strategy group_by_length, which draws another order of rows: of this epoch "
            "some rows may be trained twice and others not"
        )
    return [{"from": str(checkpoint), "changed": changed}]
