"""Checks that a run can resume from a checkpoint, and applies settings that changed since it was saved."""

import dataclasses
import hashlib
from enum import Enum
from pathlib import Path

from loguru import logger

from utils.model.adapter import adapter_of
from utils.runtime.distributed import uses_fsdp, world_size, zero_stage
from utils.runtime.errors import UserError
from utils.storage import weights as weight_files
from utils.storage.run_folder import new_run_remedy, read_manifest
from utils.train.resume_rules import (
    FIXED,
    OPTIONS,
    ORDER,
    PLAIN_OPTIMIZERS,
    SCHEDULE,
    SIZES,
    STEP_BY_STEP,
    UPDATED,
    rule_of,
)

# settings that define the model and its rows: a checkpoint with another value cannot be resumed
_SAME = (
    "task_type", "train_mode", "template_name", "template_date", "max_len", "max_prompt_length", "train_on", "use_dora",
    "lora_rank", "lora_alpha", "lora_target_modules", "use_rslora", "init_lora_weights", "train_special_tokens",
    "val_size", "thinking", "rope_scaling", "add_tokens", "trainable_layers", "trainable_modules",
)  # fmt: skip
_TOKENS = "num_tokens"  # its key in the stateful_callbacks of trainer_state.json


def run_settings(args, train_args, data) -> dict:
    """The settings that a checkpoint stores: those a resumed run must share, and those it should share.

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument.
        data: the prepared rows.
    """
    common = dataclasses.asdict(args)
    must = {name: common[name] for name in _SAME}
    must["the base model"] = model_fingerprint(args.model_name_or_path)
    must["the adapter to start from"] = args.adapter_name_or_path and model_fingerprint(args.adapter_name_or_path)
    must["optim"] = _plain(train_args.optim)
    must |= {name: common[name] for name in ("loraplus_lr_ratio", "layerwise_lr_decay")}
    must["use_muon"] = args.use_muon or None
    must["lora_experts"], must["train_router"] = args.lora_experts or None, args.train_router or None
    must["the seed that held rows back"] = train_args.seed if args.val_size else None
    stage = zero_stage(train_args)
    zero = train_args.deepspeed_plugin is not None
    must["DeepSpeed"] = f"ZeRO-{stage} on {world_size()} processes" if zero else None
    must["streaming"] = args.streaming or None
    must["shuffle_buffer"] = args.shuffle_buffer if args.streaming else None
    must["the order of rows"] = data.order.fingerprint if data.order is not None else None
    must["the training rows"] = data.report.key[:12]
    recipe = [field.name for field in dataclasses.fields(train_args) if field.init]
    should = {name: _plain(getattr(train_args, name)) for name in recipe if rule_of(name) is not None}
    should |= {"processes": str(world_size()), "lora_dropout": str(args.lora_dropout), "precision": args.precision}
    evaluated = data.eval_report.key[:12] if data.eval_report else None
    return {"must": must, "should": should, "evaluation": evaluated}


def _plain(value) -> str:
    return str(value.value if isinstance(value, Enum) else value)


def model_fingerprint(path: str) -> str:
    """A short hash of the configuration and weights in a model's folder; a Hub name is returned unchanged."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256(str(weight_files.weights_fingerprint(folder)).encode())
    for file in sorted(folder.glob("*config.json")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def changed_settings(then: dict, now: dict) -> dict[str, list[str]]:
    """The settings of `should` that have changed, with the old and the new value: `{"seed": ["42", "7"]}`."""
    return {
        name: [then["should"][name], value]
        for name, value in now["should"].items()
        if then["should"].get(name, value) != value
    }


def check_resume(args, train_args, data) -> None:
    """Refuses a checkpoint of another model, adapter or data, or with settings that cannot change, before weights load.

    Raises:
        UserError: with the old and new value of every setting that must not differ.
    """
    checkpoint = train_args.resume_from_checkpoint
    manifest = read_manifest(Path(checkpoint)) if checkpoint else None
    if train_args.save_only_model and train_args.save_strategy != "no":
        logger.warning("--save_only_model true: the checkpoints hold weights alone, and none can be resumed from")
    if manifest is None:
        return
    then, now = manifest["settings"], run_settings(args, train_args, data)
    flag = f"--resume_from_checkpoint {checkpoint!r} was made with"
    different = [
        f"{flag} {name} {then['must'].get(name)}, now: {value}. Use the same, or start anew in another --output_dir"
        for name, value in now["must"].items()
        if str(then["must"].get(name)) != str(value)
    ]
    changed = changed_settings(then, now)
    different += _check_sizes(flag, then["should"], now["should"], changed)
    remedy = new_run_remedy(checkpoint, adapter_of(args).is_adapter)
    different += [
        f"{flag} {name} {before}, now: {value}, and {why}. Use the same, or {remedy}"
        for name, (before, value) in changed.items()
        if (why := _why_not(name, then["should"], train_args))
    ]
    if different:
        raise UserError(*different)
    _log_changes(then, now, changed)
    if train_args.train_sampling_strategy == "group_by_length":
        logger.warning(
            "resuming with train_sampling_strategy group_by_length, which draws a new order of rows: some rows of this "
            "epoch may be trained twice and others not"
        )


def resumed_from(train_args, settings: dict) -> dict | None:
    """The checkpoint that a run resumes from and the settings that changed since, for the run's record.

    `{"from": "output/sft/checkpoint-12", "changed": {"max_steps": ["9", "7"]}}`; None for a run from the start.

    Args:
        train_args: the recipe's TrainArgument.
        settings: this run's, from `run_settings`.
    """
    checkpoint = train_args.resume_from_checkpoint
    manifest = read_manifest(Path(checkpoint)) if checkpoint else None
    if manifest is None:
        return None
    return {"from": str(checkpoint), "changed": changed_settings(manifest["settings"], settings)}


def _log_changes(then: dict, now: dict, changed: dict[str, list[str]]) -> None:
    """Logs the settings that differ from the checkpoint's, and the consequence."""
    for name, (before, value) in changed.items():
        how = "the new value applies from here on" if name in UPDATED else "later steps will differ"
        if name not in SIZES:
            logger.warning("resuming with {} {}, it was {}: {}", name, value, before, how)
    if changed.keys() & set(SIZES):
        drawn = "; random numbers, such as dropout's, will differ" if "processes" in changed else ""
        sizes = _sizes(now["should"])[1], _sizes(then["should"])[1]
        logger.info("resuming with {}, it was {}: the same rows in every step{}", *sizes, drawn)
    rows = [settings.get("evaluation") for settings in (then, now)]
    if rows[0] != rows[1]:
        logger.warning("resuming with other validation rows: evaluations before and after are not comparable")


def _why_not(name: str, then: dict[str, str], train_args) -> str | None:
    """Why a setting cannot change on resume; None if it can."""
    if name in ORDER:
        return "rows of the epoch would be trained twice and others not"
    if name in FIXED:
        return "the optimizer keeps the checkpoint's"
    if name not in UPDATED:
        return None
    if name in ("max_steps", "num_train_epochs"):
        return None
    stateful = {then.get("lr_scheduler_type"), train_args.lr_scheduler_type.value} & STEP_BY_STEP
    if stateful and name in ("learning_rate", *SCHEDULE):
        return f"the schedule {stateful.pop()} depends on its earlier steps"
    if train_args.deepspeed_plugin is not None or train_args.fsdp or uses_fsdp():
        return "DeepSpeed and FSDP set it back to the checkpoint's"
    if train_args.optim.value not in PLAIN_OPTIMIZERS:
        return f"the optimizer {train_args.optim.value} sets it back to the checkpoint's"
    return None


def _sizes(settings: dict[str, str]) -> tuple[int, str]:
    """The rows of a step, and how they are composed: `(8, "8 rows a step (2 processes × 2 rows × 2 accumulated)")`."""
    processes, rows, accumulated = (int(settings.get(name, 1)) for name in SIZES)
    total = processes * rows * accumulated
    how = f"{processes} process{'es' if processes > 1 else ''} × {rows} rows × {accumulated} accumulated"
    return total, f"{total} rows a step ({how})"


def _check_sizes(flag: str, then: dict[str, str], now: dict[str, str], changed: dict) -> list[str]:
    """Refuses another number of rows per step, as the position in the epoch is stored in steps."""
    (before, text_before), (total, text) = _sizes(then), _sizes(now)
    if not changed.keys() & set(SIZES):
        return []
    split = "split_batches=True" in then.get("accelerator_config", "")
    if before == total and not split:
        return []
    processes = int(now["processes"])
    allowed = (
        f"{before // processes} with these processes" if before % processes == 0 else f"{before} on other processes"
    )
    return [
        f"{flag} {text_before}, now: {text}: rows of the epoch would be left out or trained twice. Use the same, or "
        f"--per_device_train_batch_size times --gradient_accumulation_steps = {allowed}"
    ]


class ResumeMixin:
    """A mix-in for transformers' Trainer: a resumed run uses the given optimizer options, schedule and intervals.

    transformers 5.23 would restore those of the checkpoint.

    Attributes:
        settings: from `run_settings`, stored in every checkpoint.
    """

    settings: dict = {}

    def _init_training_state(self, max_steps, *args, **kwargs):
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # intervals of logging, evaluation and saving as given now
        # TRL 1.16 counts the tokens it logs as `num_tokens` in the trainer, not in its state, and restarts at 0
        self._total_train_tokens = self.state.stateful_callbacks.get(_TOKENS, {}).get("attributes", {}).get("total", 0)
        return found

    def _save_checkpoint(self, model, trial):
        self.state.stateful_callbacks[_TOKENS] = {"args": {}, "attributes": {"total": self._total_train_tokens}}
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        given = [dict(group, params=None) for group in self.optimizer.param_groups]
        rates = list(getattr(self.lr_scheduler, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        manifest = read_manifest(Path(checkpoint)) if checkpoint else None
        changed = changed_settings(manifest["settings"], self.settings).keys() & UPDATED if manifest else set()
        names = {OPTIONS[name] for name in changed & OPTIONS.keys()}
        for group, options in zip(self.optimizer.param_groups, given, strict=True):
            group.update({name: options[name] for name in names & options.keys()})
        self._set_rates(rates, changed)

    def _set_rates(self, rates: list[float], changed: set[str]) -> None:
        """Sets the learning rates of the next step if base rate or schedule differ from the checkpoint's."""
        from torch.optim.lr_scheduler import LambdaLR

        scheduler = self.lr_scheduler
        if not isinstance(scheduler, LambdaLR) or not changed & {"learning_rate", *SCHEDULE}:
            return
        if "learning_rate" in changed:
            scheduler.base_lrs = rates
        # rate of step t = base rate · schedule(t)
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        now = [base * schedule(scheduler.last_epoch) for base, schedule in pairs]
        for group, rate in zip(scheduler.optimizer.param_groups, now, strict=True):
            group["lr"] = rate
        scheduler._last_lr = now
