"""The best checkpoint: `--load_best_model_at_end`, `--metric_for_best_model` and `--early_stopping_patience`."""

import math

from loguru import logger

from utils.runtime.errors import Problem, nearest, refusal


def resolve(settings) -> None:
    """Sets what keeping the best weights and stopping early need: strategies, steps and metric; logs each change.

    A value that was given as a flag is never changed. Where the given values do not fit together, the best weights are
    not kept, so that the trainer's arguments can be built, and `validate` reports why.
    """
    common, values, given = settings.common, settings.values, settings.given
    if _stops_early(common) and not values.get("load_best_model_at_end"):
        if "load_best_model_at_end" not in given:
            logger.info("--early_stopping_patience needs the best checkpoint: --load_best_model_at_end is set to true")
        values["load_best_model_at_end"] = True
    if _evaluation_flags(settings) and not _has_eval_rows(common):
        values.update(load_best_model_at_end=False, eval_strategy="no", metric_for_best_model=None, eval_on_start=False)
        if _text(values, "save_strategy") == "best":
            values["save_strategy"] = "no"
        return
    if values.get("load_best_model_at_end"):
        _match_strategies(values, given)
        if _strategies_match(values):
            _match_steps(values, given)
        values["load_best_model_at_end"] = not _strategy_problems(values)
    if values.get("load_best_model_at_end") or _text(values, "save_strategy") == "best":
        values["metric_for_best_model"] = values.get("metric_for_best_model") or "eval_loss"
    _resolve_metric(settings)


def validate(settings) -> list[Problem]:
    """Checks early stopping's numbers, that there is something to evaluate, the strategies and the metric."""
    common, requested = settings.common, settings.requested
    problems = _wrong_numbers(common)
    early = _stops_early(common)
    if early and not requested.get("load_best_model_at_end") and "load_best_model_at_end" in settings.given:
        problems += refusal(
            f"--early_stopping_patience {common.early_stopping_patience} stops when the weights have become worse, "
            "and --load_best_model_at_end false would save those; leave it out",
            "early_stopping_patience",
            "load_best_model_at_end",
        )
    flags = _evaluation_flags(settings)
    if flags and not _has_eval_rows(common):
        text = ", ".join(f"--{name} {value}" for name, value in flags.items())
        return problems + refusal(
            f"evaluation needs rows ({text}), and none are given; give --eval_data_path or --val_size",
            *flags,
            "eval_data_path",
            "val_size",
        )
    if early or requested.get("load_best_model_at_end"):
        problems += _strategy_problems(settings.values)
    return problems + _metric_problems(settings)


def _has_eval_rows(common) -> bool:
    return bool(common.eval_data_path or common.val_size)


def _stops_early(common) -> bool:
    return bool(common.early_stopping_patience) and not _wrong_numbers(common)


def _wrong_numbers(common) -> list[Problem]:
    patience, threshold = common.early_stopping_patience, common.early_stopping_threshold
    if patience is not None and patience < 0:
        return refusal(
            f"--early_stopping_patience {patience} is not allowed; give a number of evaluations, or 0 for never",
            "early_stopping_patience",
        )
    if not 0 <= threshold < math.inf:
        return refusal(
            f"--early_stopping_threshold {threshold} is not allowed; give at least 0", "early_stopping_threshold"
        )
    if threshold and not patience:
        return refusal(
            f"--early_stopping_threshold {threshold} does nothing without --early_stopping_patience; give both",
            "early_stopping_threshold",
            "early_stopping_patience",
        )
    return []


def _text(values: dict, name: str) -> str:
    return str(getattr(values.get(name), "value", values.get(name)))


def _evaluation_flags(settings) -> dict[str, str]:
    """The requested flags that need an evaluation → their values."""
    common, requested, early = settings.common, settings.requested, _stops_early(settings.common)
    flags = {"early_stopping_patience": str(common.early_stopping_patience)} if early else {}
    flags |= {"load_best_model_at_end": "true"} if requested.get("load_best_model_at_end") and not early else {}
    flags |= {"save_strategy": "best"} if _text(requested, "save_strategy") == "best" else {}
    # a recipe's eval_strategy is its default, which `defaults` sets to "no" where there are no rows
    strategy = _text(requested, "eval_strategy")
    flags |= {"eval_strategy": strategy} if strategy != "no" and "eval_strategy" in settings.given else {}
    flags |= {"eval_on_start": "true"} if requested.get("eval_on_start") else {}
    return flags


def _match_strategies(values: dict, given: frozenset[str]) -> None:
    """Sets `eval_strategy` and `save_strategy` alike: the best checkpoint must be both evaluated and saved."""
    evaluate, save = _text(values, "eval_strategy"), _text(values, "save_strategy")
    if evaluate == "no" and "eval_strategy" not in given:
        evaluate = _set(values, "eval_strategy", save if save == "epoch" else "steps")
    if save not in (evaluate, "best") and "save_strategy" not in given:
        save = _set(values, "save_strategy", evaluate if evaluate != "no" else save)
    if save not in (evaluate, "best") and save != "no" and "eval_strategy" not in given:
        _set(values, "eval_strategy", save)


def _match_steps(values: dict, given: frozenset[str]) -> None:
    """Sets `save_steps` to a multiple of `eval_steps` where one of them was not given."""
    evaluate, save = _steps(values)
    if _text(values, "save_strategy") != "steps" or _is_multiple(save, evaluate):
        return
    if "save_steps" not in given:
        _set(values, "save_steps", evaluate)
    elif "eval_steps" not in given:
        _set(values, "eval_steps", save)


def _steps(values: dict) -> tuple[float, float]:
    """(eval_steps, save_steps); evaluation is as often as logging where its own steps are not set."""
    return values.get("eval_steps") or values.get("logging_steps"), values.get("save_steps")


def _strategies_match(values: dict) -> bool:
    evaluate, save = _text(values, "eval_strategy"), _text(values, "save_strategy")
    return evaluate != "no" and save in (evaluate, "best")


def _strategy_problems(values: dict) -> list[Problem]:
    """Whether every checkpoint is evaluated, so that the best one can be found."""
    if not _strategies_match(values):
        return refusal(
            "--load_best_model_at_end true needs checkpoints that were evaluated, which --eval_strategy "
            f"{_text(values, 'eval_strategy')} with --save_strategy {_text(values, 'save_strategy')} does not make; "
            "give steps or epoch for both, or --save_strategy best",
            "load_best_model_at_end",
            "eval_strategy",
            "save_strategy",
        )
    evaluate, save = _steps(values)
    if _text(values, "save_strategy") == "steps" and not _is_multiple(save, evaluate):
        return refusal(
            f"--load_best_model_at_end true needs --save_steps {save:g} to be a multiple of --eval_steps {evaluate:g}, "
            "both whole steps or both shares of the run; change one, or leave one of them out",
            "load_best_model_at_end",
            "save_steps",
            "eval_steps",
        )
    return []


def _is_multiple(save: float, evaluate: float) -> bool:
    if not evaluate or (save < 1) != (evaluate < 1):
        return False
    # shares as integer millionths: 0.3 is not a multiple of 0.1 in binary
    return round(save * 1_000_000) % round(evaluate * 1_000_000) == 0


def _set(values: dict, name: str, value):
    logger.info("--{} is set to {}, as --load_best_model_at_end needs it", name, value)
    values[name] = value
    return value


def _resolve_metric(settings) -> None:
    """Sets `metric_for_best_model` to its full name, and `greater_is_better`, which transformers would guess."""
    values, name = settings.values, settings.values.get("metric_for_best_model")
    if name is None or settings.task is None:
        return
    plain, metrics = name.removeprefix("eval_"), settings.task.metrics
    if plain not in metrics:
        values["metric_for_best_model"] = None
    else:
        values["metric_for_best_model"], values["greater_is_better"] = f"eval_{plain}", metrics[plain]


def _metric_problems(settings) -> list[Problem]:
    """Whether the task logs the metric, and `--greater_is_better` is right for it."""
    name, task = settings.requested.get("metric_for_best_model"), settings.task
    plain = name and name.removeprefix("eval_")
    if task is not None and name is not None and plain not in task.metrics:
        allowed = [f"eval_{metric}" for metric in task.metrics]
        return refusal(
            f"--metric_for_best_model {name!r} is not a metric of {task.name}."
            f"{nearest(f'eval_{plain}', allowed)} Allowed: {', '.join(allowed)}",
            "metric_for_best_model",
        )
    used = settings.values.get("metric_for_best_model")
    requested = settings.requested.get("greater_is_better")
    if used is not None and requested not in (None, settings.values.get("greater_is_better")):
        better = "more" if settings.values["greater_is_better"] else "less"
        return refusal(
            f"--greater_is_better {str(requested).lower()}: of {used} {better} is better; leave the flag out",
            "greater_is_better",
        )
    return []
