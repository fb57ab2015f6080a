"""What is asked of evaluation: which figure tells the best weights, and what keeping them and stopping early need."""

import math

from loguru import logger

from utils.runtime.errors import Problem, nearest, refusal

# figure → whether more is better; what else a trainer logs has no best
_OF_TOKENS = {"loss": False, "perplexity": False, "token_accuracy": True}
_OF_PAIRS = {"loss": False, "rewards/accuracies": True, "rewards/margins": True, "rewards/chosen": True}
FIGURES = {"pretrain": _OF_TOKENS, "sft": _OF_TOKENS, "dpo_multi": _OF_PAIRS, "dpo_single": _OF_PAIRS}


def settle_evaluation(common, values: dict, given: set[str]) -> list[Problem]:
    """Sets what `--load_best_model_at_end` and `--early_stopping_patience` need, and says so in the log.

    A value that was given as a flag is never changed; where it cannot be kept, that is a problem.

    Args:
        common: CommonArgs.
        values: the recipe's, of which strategies, steps and the figure are settled.
        given: the names that were given as flags.

    Returns:
        the problems, each with its remedy.
    """
    problems = _wrong_numbers(common)
    early = bool(common.early_stopping_patience) and not problems
    if early and not values.get("load_best_model_at_end"):
        if "load_best_model_at_end" in given:
            problems += refusal(
                f"--early_stopping_patience {common.early_stopping_patience} stops when the weights have become worse, "
                "and --load_best_model_at_end false would save those; leave it out",
                "early_stopping_patience",
                "load_best_model_at_end",
            )
        else:
            logger.info("--early_stopping_patience needs the best checkpoint: --load_best_model_at_end is set to true")
        values["load_best_model_at_end"] = True
    asked = _asked(common, values, early)
    if asked and not (common.eval_data_path or common.val_size):
        _ask_for_none(values)
        flags = ", ".join(f"--{name} {value}" for name, value in asked.items())
        return problems + refusal(
            f"evaluation is asked for ({flags}) without rows for it; give --eval_data_path or --val_size",
            *asked,
            "eval_data_path",
            "val_size",
        )
    if values.get("load_best_model_at_end"):
        problems += _match_strategies(values, given) or _match_steps(values, given)
    if values.get("load_best_model_at_end") or _text(values, "save_strategy") == "best":
        values["metric_for_best_model"] = values.get("metric_for_best_model") or "eval_loss"
    return problems + _settle_figure(common, values)


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


def _asked(common, values: dict, early: bool) -> dict[str, str]:
    """The flags that need an evaluation → their values."""
    flags = {"early_stopping_patience": str(common.early_stopping_patience)} if early else {}
    flags |= {"load_best_model_at_end": "true"} if values.get("load_best_model_at_end") and not early else {}
    flags |= {"save_strategy": "best"} if _text(values, "save_strategy") == "best" else {}
    strategy = _text(values, "eval_strategy")
    flags |= {"eval_strategy": strategy} if strategy != "no" else {}
    flags |= {"eval_on_start": "true"} if values.get("eval_on_start") else {}
    return flags


def _ask_for_none(values: dict) -> None:
    """Takes back what cannot be had, so that the other problems can be told as well."""
    values.update(load_best_model_at_end=False, eval_strategy="no", metric_for_best_model=None, eval_on_start=False)
    if _text(values, "save_strategy") == "best":
        values["save_strategy"] = "no"


def _match_strategies(values: dict, given: set[str]) -> list[Problem]:
    """The best checkpoint can only be one that was both evaluated and saved."""
    evaluate, save = _text(values, "eval_strategy"), _text(values, "save_strategy")
    if evaluate == "no" and "eval_strategy" not in given:
        evaluate = _set(values, "eval_strategy", save if save == "epoch" else "steps")
    if save not in (evaluate, "best") and "save_strategy" not in given:
        save = _set(values, "save_strategy", evaluate if evaluate != "no" else save)
    if save not in (evaluate, "best") and save != "no" and "eval_strategy" not in given:
        evaluate = _set(values, "eval_strategy", save)
    if evaluate != "no" and save in (evaluate, "best"):
        return []
    values["load_best_model_at_end"] = False
    return refusal(
        f"--load_best_model_at_end true needs checkpoints that were evaluated, which --eval_strategy {evaluate} with "
        f"--save_strategy {save} does not make; give steps or epoch for both, or --save_strategy best",
        "load_best_model_at_end",
        "eval_strategy",
        "save_strategy",
    )


def _match_steps(values: dict, given: set[str]) -> list[Problem]:
    if not values.get("load_best_model_at_end") or _text(values, "save_strategy") != "steps":
        return []
    evaluate, save = values.get("eval_steps") or values.get("logging_steps"), values.get("save_steps")
    if _is_multiple(save, evaluate):
        return []
    if "save_steps" not in given:
        _set(values, "save_steps", evaluate)
    elif "eval_steps" not in given:
        _set(values, "eval_steps", save)
    else:
        values["load_best_model_at_end"] = False
        return refusal(
            f"--load_best_model_at_end true needs --save_steps {save:g} to be a multiple of --eval_steps {evaluate:g}, "
            "both whole steps or both shares of the run; give such a one, or leave one of them out",
            "load_best_model_at_end",
            "save_steps",
            "eval_steps",
        )
    return []


def _is_multiple(save: float, evaluate: float) -> bool:
    if not evaluate or (save < 1) != (evaluate < 1):
        return False
    # shares as whole millionths: 0.3 is no multiple of 0.1 in binary
    return round(save * 1_000_000) % round(evaluate * 1_000_000) == 0


def _set(values: dict, name: str, value):
    logger.info("--{} is set to {}, as --load_best_model_at_end needs it", name, value)
    values[name] = value
    return value


def _settle_figure(common, values: dict) -> list[Problem]:
    """`--metric_for_best_model` by its full name, and which way is better: transformers guesses that from the name."""
    name, figures = values.get("metric_for_best_model"), FIGURES.get(common.task_type)
    if name is None or figures is None:
        return []
    plain, asked = name.removeprefix("eval_"), values.get("greater_is_better")
    if plain not in figures:
        values["metric_for_best_model"] = None
        allowed = [f"eval_{figure}" for figure in figures]
        return refusal(
            f"--metric_for_best_model {name!r} is not a figure of {common.task_type}."
            f"{nearest(f'eval_{plain}', allowed)} Allowed: {', '.join(allowed)}",
            "metric_for_best_model",
        )
    values["metric_for_best_model"], values["greater_is_better"] = f"eval_{plain}", figures[plain]
    if asked is not None and asked != figures[plain]:
        better = "more" if figures[plain] else "less"
        return refusal(
            f"--greater_is_better {str(asked).lower()}: of eval_{plain} {better} is better; leave the flag out",
            "greater_is_better",
        )
    return []
