"""How the rows of a step are laid out: end to end where the model computes them so, else padded, else not at all."""

import copy

from loguru import logger

from utils.data.collate import build_collator
from utils.model.base_config import load_config
from utils.model.meta import whole_models
from utils.model.probe import Probe, example_rows, probe
from utils.model.small import small_model
from utils.patches.attention import use_row_attention
from utils.patches.rope import use_row_rope
from utils.runtime.distributed import broadcast_object
from utils.runtime.errors import UserError


def resolve_layout(args, train_args, task, model, tokenizer) -> Probe:
    """Probes the model and sets `train_args.padding_free` to a layout that is right.

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument.
        task: of the run; its collators lay the rows out.
        model: as loaded, with an adapter or without.
        tokenizer: the run's.

    Raises:
        UserError: no layout that the settings allow is right.
    """
    # every process must choose the same, so all go by what the first one finds
    with whole_models(train_args):
        found = broadcast_object(probe_for_task(args, train_args, task, model, tokenizer))
    problem, chosen, reason = choose_layout(args, train_args, task, found, uses_eager(model))
    if problem:
        raise UserError(problem)
    if reason:
        logger.warning("{}", reason)
    if task.supports_padding_free:
        train_args.padding_free = chosen
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
        rows = [one._asdict() for row in rows for one in task.row_type.sequences(row)]
    return probe(model, collators, rows)


def choose_layout(args, train_args, task, found: Probe, eager: bool) -> tuple[str | None, bool, str | None]:
    """Decides by what a probe found.

    Args:
        args, train_args, task: of the run.
        found: the probe's result.
        eager: whether the model's attention computes every pair of tokens of a step.

    Returns:
        (why the run cannot be trained or None, whether rows lie end to end, the line that says so or None)
    """
    name = f"--model_name_or_path {args.model_name_or_path!r}"
    if found.longest and args.max_len > found.longest:
        what = f"the model lets the tokens of a row of more than {found.longest:,} see those after them"
        return f"{name}: {what}; give --max_len {found.longest}", False, None
    packing, padding_free = task.packs(train_args), bool(getattr(train_args, "padding_free", False))
    if found.fails or found.not_causal:
        return f"{name}: the model {found.fails or found.not_causal}; choose another model", False, None
    if packing:
        if found.end_to_end:
            return (
                f"{name}: the model {found.end_to_end}, so --packing true would train it wrong; leave it out",
                False,
                None,
            )
        return None, True, None
    free = task.lays_end_to_end(train_args)
    slower = eager and train_args.per_device_train_batch_size > 1 and not found.padded
    if free and not found.end_to_end and not slower:
        return None, True, None
    if found.padded:
        alone = train_args.per_device_train_batch_size == train_args.per_device_eval_batch_size == 1
        several = len(task.row_type.sequence_columns) > 1
        if several or not alone:
            remedy = (
                "choose another model"
                if several
                else "give --per_device_train_batch_size 1 --per_device_eval_batch_size 1, which needs no padding"
            )
            return f"{name}: the model {found.padded}; {remedy}", False, None
    if not free:
        return None, padding_free, None
    if found.end_to_end:
        return None, False, f"rows are padded: the model {found.end_to_end}"
    return None, False, "rows are padded: the model's attention is eager, which is slower on rows laid end to end"


def expected_layout(args, train_args, task, tokenizer) -> tuple[str | None, bool, str | None]:
    """What a run will choose, before any weights load: found on a small random model of the same configuration.

    Args:
        args, train_args, task, tokenizer: as for `resolve_layout`.

    Returns:
        as `choose_layout`; where no small model can be built, that the layout stays as it is set.
    """
    use_row_attention()
    options = {"trust_remote_code": args.trust_remote_code}
    if args.attn_implementation in ("sdpa", "eager"):
        options["attn_implementation"] = args.attn_implementation
    config = load_config(args.model_name_or_path, args.trust_remote_code)
    with whole_models(train_args):
        model = small_model(config, **options)
        if model is None:
            return None, bool(getattr(train_args, "padding_free", False)), None
        use_row_rope(model)
        found = probe_for_task(args, train_args, task, model, tokenizer)
    if found.fails:  # maybe only at this size
        return None, bool(getattr(train_args, "padding_free", False)), None
    return choose_layout(args, train_args, task, found, uses_eager(model))


def uses_eager(model) -> bool:
    """Whether attention goes over all pairs of tokens of a step, whatever rows they belong to."""
    return getattr(model.config, "_attn_implementation", None) == "eager"
