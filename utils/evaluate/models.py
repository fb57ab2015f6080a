"""The models of an evaluation: a trained model and the base it was trained from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loguru import logger

from utils.config.model_path import check_model_path
from utils.infer.load import Parts, TrainedArgs, base_of_run, check_trained, load_format, load_trained
from utils.model.rope import scaled_by_adapters
from utils.model.source import made_folder
from utils.model.tokenizer import apply_chat_format, load_tokenizer, stop_at_eos
from utils.runtime.errors import Problem, refusal
from utils.storage.files import project_path
from utils.storage.weights import check_weight_files, weights_fingerprint
from utils.template import get_template
from utils.template.thinking import set_thinking


@dataclass(frozen=True)
class EvalModel:
    """A model to evaluate; its weights are loaded later.

    Attributes:
        name: `base` or `trained`; `model` if there is only one.
        args: the flags that name it.
        parts: its base and adapters.
        tokenizer: with the chat format of its prompts.
        config: its configuration, transformers.PretrainedConfig.
    """

    name: str
    args: TrainedArgs
    parts: Parts
    tokenizer: Any
    config: Any

    def load(self, dtype="auto"):
        """Loads the weights, in evaluation mode; generation stops at the chat format's stop token."""
        model = load_trained(self.args, self.parts, dtype)
        if self.tokenizer.eos_token_id is not None:
            stop_at_eos(model, self.tokenizer)
        return model


def check_eval_models(
    args: TrainedArgs, compare_base: bool, insist: bool
) -> tuple[dict[str, Parts], list[str | Problem]]:
    """Finds the model that the flags name, and the base it was trained from.

    An adapter names its base; for full weights it is in the run's record, or given as `--base_model`.

    Args:
        args: the flags.
        compare_base: whether to evaluate the base as well.
        insist: whether a base that cannot be found is a problem; else that is logged, and the model is evaluated alone.

    Returns:
        `{"base": parts, "trained": parts}`, or `{"model": parts}` alone; and the problems.
    """
    path = args.model_path or ""
    full = not args.adapter and not (Path(path) / "adapter_config.json").is_file()
    parts, problems = check_trained(replace(args, base_model=None) if full else args)
    if problems or parts is None:
        return {}, problems
    if not compare_base:
        return {"model": parts}, []
    base, problems = (parts.base, []) if parts.adapters else _base_of_weights(args, parts.base)
    if base and not problems:
        return {"base": Parts(base, ()), "trained": parts}, []
    if insist or args.base_model:
        return {}, problems
    logger.info("only one model is evaluated: {}", problems[0])
    return {"model": parts}, []


def _base_of_weights(args: TrainedArgs, folder: str) -> tuple[str | None, list[Problem]]:
    recorded = base_of_run(folder)
    base = made_folder(args.base_model or project_path(recorded.get("path") or ""))
    if not base:
        return None, refusal(
            f"--model_path {args.model_path!r} does not say what it was trained on (it has no train_args.json with a "
            "base); give that as --base_model, or leave it out with --compare_base false",
            "model_path",
            "base_model",
        )
    problems = check_model_path("--base_model" if args.base_model else "the base", base, args.trust_remote_code)
    if not problems and Path(base).is_dir():
        problems = check_weight_files("the base", base)
    now = None if problems else weights_fingerprint(base)
    if now and recorded.get("fingerprint") not in (None, now) and not args.allow_other_base:
        problems = refusal(
            f"{args.model_path!r} was trained on weights {recorded['fingerprint']}, and {base!r} has {now}; give those "
            "it was trained on, or --allow_other_base true",
            "allow_other_base",
        )
    remedy = "give the base as --base_model, or leave it out with --compare_base false"
    return base, [p if "base_model" in p.flags else replace(p, remedy=remedy) for p in problems]


def load_eval_models(args: TrainedArgs, models: dict[str, Parts]) -> list[EvalModel]:
    """Loads tokenizers and configurations, and sets the chat format of each model's prompts.

    That is `--template_name`, or the model's own format. A base without one gets that of the trained model, a single
    model without one gets plain text, the template `default`.

    Raises:
        UserError: something cannot be loaded.
    """
    found: list[EvalModel] = []
    for name, parts in reversed(models.items()):  # the trained model first, as the base may need its format
        own = replace(args, base_model=None, model_path=parts.base, adapter=None) if name == "base" else args
        tokenizer = _format(own, parts, found[0].tokenizer if found else None)
        config = scaled_by_adapters(parts, args.trust_remote_code)
        found.insert(0, EvalModel(name, own, parts, tokenizer, config))
    return found


def _format(args: TrainedArgs, parts: Parts, other):
    """The tokenizer of a model with the chat format of its prompts; `other` is the trained model's tokenizer."""
    if parts.adapters or args.template_name:
        return load_format(args, parts)
    tokenizer = load_tokenizer(parts.base, args.trust_remote_code, flag="--model_path")
    if tokenizer.chat_template:
        set_thinking(tokenizer, args.thinking)
    elif other is not None:
        tokenizer.chat_template, tokenizer.eos_token = other.chat_template, other.eos_token
        logger.info("{} has no chat format of its own; that of the trained model is used", parts.base)
    else:
        apply_chat_format(tokenizer, get_template("default", tokenizer, thinking=args.thinking))
        logger.info("{} has no chat format of its own; plain text is used, the template 'default'", parts.base)
    return tokenizer
