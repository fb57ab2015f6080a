"""Settings that conflict with each other, with the model or with the number of rows."""

import math

from utils.doctor.codes import ERROR, WARNING
from utils.doctor.findings import Finding
from utils.doctor.tokens import row_lengths
from utils.model.adapter import adapter_of
from utils.model.meta import model_size_or_none
from utils.model.rope import positions_of
from utils.runtime.text import format_count
from utils.train.plan import passes_per_epoch, steps_of

_SMALL = 300_000_000  # weights; smaller models take larger rates
_SMALL_MODELS_RATE = 2e-2
_NOT_TINY = 50_000_000  # weights; models with as many or more know language already
_MANY_PASSES = 10
_FEW_STEPS = 20  # an epoch of fewer steps feels its last one
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")  # sections by which DeepSpeed logs on its own


def settings_findings(args, train_args, config, data, seen, processes: int) -> list[Finding]:
    """Checks the settings of a run.

    Args:
        args, train_args: of the run.
        config: the model's; None where it cannot be had.
        data: the prepared rows; None where there are none.
        seen: those whose lengths are looked at.
        processes: how many train together.
    """
    findings = _learning_rate(args, train_args) + _passes(args, train_args) + deepspeed_keys(train_args)
    if config is not None:
        findings += _arithmetic(args, config)
    if data is not None:
        findings += _warm_up(train_args, steps_of(train_args, data.rows_in_epoch(), processes))
        findings += _last_batch(train_args, data.rows_in_epoch(), processes)
        findings += _positions(args, config, seen) if config is not None else []
    return findings


def _learning_rate(args, train_args) -> list[Finding]:
    optimizer = str(getattr(train_args.optim, "value", train_args.optim))
    if "adam" not in optimizer:
        return []
    task, adapter = args.task, adapter_of(args)
    if adapter.is_adapter not in task.usual_learning_rates:
        return []
    low, high = (rate * adapter.rate_factor for rate in task.usual_learning_rates[adapter.is_adapter])
    size = model_size_or_none(args)
    if size is not None and size.weights < _SMALL:
        high = _SMALL_MODELS_RATE * adapter.rate_factor
    if low <= train_args.learning_rate <= high:
        return []
    what = "adapters" if adapter.is_adapter else "all weights"
    message = f"--learning_rate {train_args.learning_rate:g} for {task.family} of {what}; usual is {low:g} to {high:g}"
    return [Finding("LEARNING_RATE_UNUSUAL", message)]


def _passes(args, train_args) -> list[Finding]:
    size = model_size_or_none(args)
    if train_args.max_steps > 0 or train_args.num_train_epochs < _MANY_PASSES or size is None:
        return []
    if size.weights < _NOT_TINY:
        return []
    message = f"--num_train_epochs {train_args.num_train_epochs:g}, and the base has {size.weights:,} weights"
    return [Finding("PASSES_MANY", message)]


def _warm_up(train_args, steps: int) -> list[Finding]:
    warm_up = train_args.get_warmup_steps(steps)
    if warm_up < steps and (warm_up * 2 < steps or warm_up <= 1):
        return []
    message = f"--warmup_steps {train_args.warmup_steps:g} is {format_count(warm_up, 'step')} of {steps:,}"
    if steps == 1:
        message += ", and the first step of a warm-up has the learning rate 0, so nothing is trained"
    elif warm_up >= steps:
        message += ", so the learning rate is never reached"
    return [Finding("WARMUP_TOO_LONG", message)]


def _last_batch(train_args, rows: int, processes: int) -> list[Finding]:
    """Checks for a short last step, which matters only in an epoch of few steps."""
    every = train_args.gradient_accumulation_steps
    batches = passes_per_epoch(train_args, rows, processes)
    steps = math.ceil(batches / every)
    if every == 1 or batches % every == 0 or steps >= _FEW_STEPS:
        return []
    message = (
        f"--gradient_accumulation_steps {every} does not divide the {batches:,} batches of an epoch: the last of its "
        f"{steps} steps has {batches % every} batches, and counts as much as the others"
    )
    return [Finding("LAST_BATCH_SHORT", message)]


def _arithmetic(args, config) -> list[Finding]:
    made_in = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if args.precision != "fp16" or made_in != "bfloat16":
        return []
    return [Finding("FP16_MODEL_IS_BF16", f"--precision fp16, and {args.model_name_or_path!r} was made in bfloat16")]


def _positions(args, config, data) -> list[Finding]:
    there = positions_of(config)
    if there is None:
        return []
    import numpy

    parts = [data.train] + ([data.eval] if data.eval_report is not None else [])
    rows = numpy.concatenate([row_lengths(part, args.task.row_type) for part in parts])
    over = int((rows > there).sum())
    if not over:
        return []
    message = f"{over:,} rows are longer than the model's {there:,} positions, the longest {rows.max():,} tokens"
    size = model_size_or_none(args)
    ends = size is not None and size.position_table
    message += (
        "; its table of positions ends there"
        if ends
        else ("; it was not trained on those beyond. --rope_scaling extends the context")
    )
    return [Finding("MAX_LEN_OVER_POSITIONS", message, severity=ERROR if ends else WARNING)]


# ------------------------------------------------------------------ DeepSpeed


def deepspeed_keys(train_args) -> list[Finding]:
    """Finds keys of the DeepSpeed file that the arguments' checks accept and that conflict with flags."""
    config = getattr(getattr(train_args, "hf_deepspeed_config", None), "config", None) or {}
    found = []
    for section in _MONITORS:
        if isinstance(config.get(section), dict) and config[section].get("enabled"):
            found.append(f"{section} logs by itself, whatever --report_to says")
    if "activation_checkpointing" in config:
        found.append("activation_checkpointing does nothing here; --gradient_checkpointing does")
    return [Finding("DEEPSPEED_SHADOWS", f"the DeepSpeed file's {fault}", severity=WARNING) for fault in found]
