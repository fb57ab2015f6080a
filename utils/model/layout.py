"""Chooses a batch layout, concatenated or padded rows, by probing which of them the model computes correctly."""

import copy
from typing import NamedTuple

from loguru import logger

from utils.data.collate import build_collator
from utils.model.meta import whole_models
from utils.model.probe import Probe, example_rows, probe
from utils.model.rope import load_scaled_config
from utils.model.small import small_model
from utils.patches.attention import use_row_attention
from utils.patches.rope import use_row_rope
from utils.runtime.distributed import broadcast_object
from utils.runtime.errors import UserError


def resolve_padding_free(args, train_args, task, model, tokenizer) -> Probe:
    """Sets `train_args.padding_free` to a layout that the model computes correctly, which it probes.

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument.
        task: the run's task, whose collators lay the rows out.
        model: as loaded, with or without an adapter.
        tokenizer: the run's.

    Returns:
        what the probe found.

    Raises:
        UserError: no layout that the settings allow is correct.
    """
    # every process must choose the same, so all use what the first one finds
    with whole_models(train_args):
        found = broadcast_object(probe_for_task(args, train_args, task, model, tokenizer))
    layout = choose_layout(args, train_args, task, found, uses_eager(model))
    if layout.problem:
        raise UserError(layout.problem)
    if layout.reason:
        logger.warning("{}", layout.reason)
    if task.supports_padding_free:
        train_args.padding_free = layout.padding_free
    return found


def probe_for_task(args, train_args, task, model, tokenizer) -> Probe:
    """Probes a model with a task's own collators."""
    settings = copy.copy(train_args)
    collators = {}
    for name in ("padded", "end_to_end") if task.lays_end_to_end(train_args) else ("padded",):
        settings.padding_free = name == "end_to_end"
        collators[name] = task.build_collator(args, settings, tokenizer)
    rows = example_rows(tokenizer, task.row_type)
    if not isinstance(collators["padded"](rows), dict):  # the trainer lays its rows out itself, and may pad them
        collators = {"padded": build_collator(tokenizer.pad_token_id, padding_free=False)}
        rows = [sequence._asdict() for row in rows for sequence in task.row_type.sequences(row)]
    return probe(model, collators, rows, task.auto_class)


class Layout(NamedTuple):
    """How the rows of a batch are laid out.

    Attributes:
        problem: why the run cannot be trained; None if it can.
        padding_free: whether rows are concatenated without padding.
        reason: why rows are padded although the settings allow `padding_free`, as a log line; None otherwise.
    """

    problem: str | None = None
    padding_free: bool = False
    reason: str | None = None


def choose_layout(args, train_args, task, found: Probe, eager: bool) -> Layout:
    """Chooses the fastest layout that the model computes correctly.

    Args:
        args, train_args, task: of the run.
        found: the probe's result.
        eager: whether the model's attention is eager, which computes every pair of tokens of a batch.
    """
    packs, concatenates = task.packs(train_args), task.lays_end_to_end(train_args)
    slower = eager and train_args.per_device_train_batch_size > 1 and not found.padded
    padding_free = packs or (concatenates and not found.end_to_end and not slower)
    if problem := _problem(args, train_args, task, found, packs, padding_free):
        return Layout(f"--model_name_or_path {args.model_name_or_path!r}: {problem}")
    if padding_free:
        return Layout(padding_free=True)
    if not concatenates:
        return Layout(padding_free=bool(getattr(train_args, "padding_free", False)))
    if found.end_to_end:
        return Layout(reason=f"rows are padded: the model {found.end_to_end}")
    return Layout(reason="rows are padded: the model's attention is eager, which is slower on rows laid end to end")


def _problem(args, train_args, task, found: Probe, packs: bool, padding_free: bool) -> str | None:
    """What makes a model's losses wrong in the chosen layout, and the remedy; None if nothing does."""
    if found.longest and args.max_len > found.longest:
        return (
            f"the model lets the tokens of a row of more than {found.longest:,} see those after them; give --max_len "
            f"{found.longest}"
        )
    if found.fails or found.not_causal:
        return f"the model {found.fails or found.not_causal}; choose another model"
    if packs and found.end_to_end:
        return f"the model {found.end_to_end}, so --packing true would train it wrong; leave it out"
    if padding_free or not found.padded:
        return None
    if len(task.row_type.sequence_columns) > 1:  # a pair's two sequences are padded to one length
        return f"the model {found.padded}; choose another model"
    if train_args.per_device_train_batch_size == train_args.per_device_eval_batch_size == 1:
        return None
    return (
        f"the model {found.padded}; give --per_device_train_batch_size 1 --per_device_eval_batch_size 1, which needs "
        "no padding"
    )


def expected_layout(args, train_args, task, tokenizer) -> Layout:
    """Predicts the layout a run will choose, by probing a small random model of the same configuration.

    Args:
        args, train_args, task, tokenizer: as for `resolve_padding_free`.

    Returns:
        as `choose_layout`; the layout that is set if no small model can be built.
    """
    as_set = Layout(padding_free=bool(getattr(train_args, "padding_free", False)))
    use_row_attention()
    options = {"trust_remote_code": args.trust_remote_code}
    if args.attn_implementation in ("sdpa", "eager"):
        options["attn_implementation"] = args.attn_implementation
    config = load_scaled_config(args.model_name_or_path, args.rope_scaling, args.trust_remote_code)
    with whole_models(train_args):
        model = small_model(config, auto_class=task.auto_class, **options)
        if model is None:
            return as_set
        use_row_rope(model)
        found = probe_for_task(args, train_args, task, model, tokenizer)
    if found.fails:  # maybe only at this size
        return as_set
    return choose_layout(args, train_args, task, found, uses_eager(model))


def uses_eager(model) -> bool:
    """Whether attention is eager: it computes all pairs of tokens of a batch, also those of different rows."""
    return getattr(model.config, "_attn_implementation", None) == "eager"
