"""Loads models for inference: a run's folder, a base model, or a base with adapters."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from loguru import logger

from utils.config.flags import arg
from utils.config.model_path import check_model_path
from utils.model.adapter_files import attach_adapter
from utils.model.experts import leave_router_logits_out
from utils.model.merge_layers import merge_onto, types_of
from utils.model.rope import scaling_of_adapters, scaling_options
from utils.model.source import check_source, find_base, is_source, made_folder, make_folder
from utils.model.tokenizer import apply_chat_format, load_tokenizer, stop_at_eos
from utils.patches.layers import keep_quantised_weights
from utils.patches.lazy_imports import import_peft
from utils.patches.rope import use_row_rope
from utils.runtime.errors import UserError, load_failure, raise_if_any
from utils.storage.run_folder import checkpoints_of, read_manifest, read_run_note
from utils.storage.weights import check_weight_files, weights_fingerprint
from utils.template import get_template, template_dict, unknown_template
from utils.template.auto import chat_templates_of
from utils.template.thinking import MODES, set_thinking


@dataclass
class TrainedArgs:
    """The flags that name a model; commands add their own."""

    model_path: str | None = arg(None, "A run's folder, with an adapter or full weights, or a base model.")
    adapter: str | None = arg(None, "More adapters on top of it, separated by commas, in the order they were trained.")
    base_model: str | None = arg(None, "The base of the adapter. Default: the one that the adapter names.")
    template_name: str | None = arg(None, "The chat format of a base model. Default: the one saved with the model.")
    thinking: Literal[MODES] = arg(
        "auto",
        "Whether the model thinks before it answers. on, off: sets the switch of the chat template. auto: as trained, "
        "or the template's own default.",
    )
    allow_other_base: bool = arg(False, "Load an adapter on another base than it was trained on.")
    trust_remote_code: bool = arg(False, "Run Python code that comes with the model.")


@dataclass(frozen=True)
class Parts:
    """A base and the adapters on top of it, in the order they were trained."""

    base: str
    adapters: tuple[str, ...]

    def last(self) -> str:
        """The folder that was trained last, whose tokenizer and chat format are used."""
        return self.adapters[-1] if self.adapters else self.base


def check_trained(args: TrainedArgs) -> tuple[Parts | None, list]:
    """Finds the base and the adapters that the flags name, and checks that they belong together.

    Returns:
        the parts, None if they cannot be found; and the problems.
    """
    if args.template_name not in (None, "auto", *template_dict):
        return None, [unknown_template(args.template_name)]
    if not args.model_path:
        return None, ["--model_path is missing; give a run's folder, such as output/sft-…, or a base model"]
    adapters = [path.strip() for path in (args.adapter or "").split(",") if path.strip()]
    if problems := _check_given(args, adapters):
        return None, problems
    base, chain, problem = _follow_adapters(args.model_path, adapters)
    if problem:
        return None, [problem]
    if args.base_model:
        if not chain:
            return None, [f"--base_model {args.base_model!r} is for an adapter, and --model_path has full weights"]
        base = made_folder(args.base_model)
        problems = check_model_path("--base_model", base, args.trust_remote_code)
    elif is_source(base):
        problems = check_source("the base" if chain else "--model_path", base)
    elif chain and not Path(base).is_dir() and (Path(base).is_absolute() or base.count("/") != 1):
        problems = [f"{chain[0]!r} was trained on {base!r}, which does not exist; give its new path as --base_model"]
    problems += _check_weights(args, base, chain)
    if not problems and not args.allow_other_base:
        problems = _check_base(base, chain)
    return Parts(base, tuple(chain)), problems


def make_base(args: TrainedArgs, parts: Parts) -> Parts:
    """Downloads or converts a base that is a short name or a GGUF file, and checks again that the adapters fit it.

    Raises:
        UserError: it cannot be made, or is another one than the adapters were trained on.
    """
    if not is_source(parts.base):
        return parts
    base = make_folder(parts.base)
    raise_if_any([] if args.allow_other_base else _check_base(base, list(parts.adapters)))
    return replace(parts, base=base)


def _check_given(args: TrainedArgs, adapters: list[str]) -> list:
    """The problems of `--model_path` and `--adapter`, each by itself."""
    path, problems = made_folder(args.model_path), []
    if not is_source(path):  # one that is not converted yet is checked as the base
        problems = check_model_path("--model_path", path, args.trust_remote_code, adapter_allowed=True)
    complete = [str(folder) for folder in checkpoints_of(Path(args.model_path)) if read_manifest(folder)]
    if problems and complete:
        problems = [
            f"--model_path {args.model_path!r} is a run that has not finished; give its checkpoint {complete[-1]!r}"
        ]
    return problems + [
        f"--adapter {path!r} has no adapter_config.json; give the folder of a run that has an adapter"
        for path in adapters
        if not _is_adapter(path)
    ]


def _follow_adapters(model_path: str, adapters: list[str]) -> tuple[str, list[str], str | None]:
    """Follows the base that each adapter names: the base without an adapter, all adapters on it, and a problem."""
    chain, base = list(adapters), model_path
    while _is_adapter(base):
        chain.insert(0, base)
        recorded, problem = _recorded_base(base)
        if problem:
            return base, chain, problem
        base = find_base(recorded, base)
        if base in chain:
            problem = f"{chain[0]!r} names {base!r} as its base, which is an adapter on top of it; give --base_model"
            return base, chain, problem
    return made_folder(base), chain, None


def _check_weights(args: TrainedArgs, base: str, adapters: list[str]) -> list:
    """The problems of the weight files: each folder must have safetensors that can be read."""
    problems: list = [
        f"{folder!r} has no adapter_model.safetensors. Other weight files can run code when they are read and "
        "are not loaded; save the adapter with save_pretrained(...) of PEFT"
        for folder in adapters
        if Path(folder).is_dir() and not (Path(folder) / "adapter_model.safetensors").is_file()
    ]
    for folder in (base, *adapters):
        problems += check_weight_files(f"--model_path {args.model_path!r}", folder) if Path(folder).is_dir() else []
    return problems


def _is_adapter(path: str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def _recorded_base(adapter: str) -> tuple[str, str | None]:
    try:
        return json.loads((Path(adapter) / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"], None
    except (ValueError, KeyError, TypeError, OSError) as error:
        return "", f"{adapter!r} has an adapter_config.json that cannot be read ({type(error).__name__}: {error})"


def base_of_run(folder: str) -> dict:
    """The base in a run's record, `{"path": …, "fingerprint": …}`; empty for an adapter from elsewhere."""
    return read_run_note(folder, "base")


def allows_special(parts: Parts) -> bool:
    """Whether the run was trained with `--allow_special_tokens_in_content true`."""
    return bool(read_run_note(parts.last(), "common").get("allow_special_tokens_in_content"))


def _check_base(base: str, adapters: list[str]) -> list[str]:
    """Refuses a base that an adapter was not trained on: other weights of its shapes would load all the same."""
    now = weights_fingerprint(base) if adapters else None
    problems = []
    for adapter in adapters:
        trained_on = base_of_run(adapter)
        if now and trained_on.get("fingerprint") not in (None, now):
            problems.append(
                f"{adapter!r} was trained on {trained_on['path']!r} with the weights {trained_on['fingerprint']}, and "
                f"{base!r} has {now}; give the base it was trained on as --base_model, or --allow_other_base true"
            )
            break  # later adapters were trained on the base with earlier ones
        if len(adapters) > 1:
            break
    return problems


def load_trained(args: TrainedArgs, parts: Parts, dtype="auto"):
    """Loads base and adapters for generation, on the GPU if there is one.

    All adapters but the last are merged, as in the training of the last one.

    Args:
        args: the flags, for the messages.
        parts: from `check_trained`.
        dtype: of the weights; "auto" is that of the files.

    Returns:
        transformers.PreTrainedModel or peft.PeftModel, in evaluation mode.

    Raises:
        UserError: the model cannot be loaded, or the adapter does not fit it.
    """
    import_peft()
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    options = {"dtype": dtype, "trust_remote_code": args.trust_remote_code, "use_safetensors": True}
    flag = "--base_model" if args.base_model else "--model_path"
    options |= scaling_options(parts.base, scaling_of_adapters(parts.adapters), args.trust_remote_code, flag)
    try:
        model = AutoModelForCausalLM.from_pretrained(parts.base, **options)
    except Exception as error:  # the hub, the file system and the model code each raise their own
        raise UserError(load_failure("base model" if parts.adapters else "model", flag, parts.base, error)) from error
    use_row_rope(model)  # rows of different lengths are computed in one batch
    leave_router_logits_out(model)
    model = _with_adapters(model, parts.adapters) if parts.adapters else model
    if parts.adapters and (Path(parts.last()) / "generation_config.json").is_file():
        # stop tokens of the run, not of the base
        model.generation_config = GenerationConfig.from_pretrained(parts.last())
    if getattr(model, "is_loaded_in_4bit", False):
        keep_quantised_weights(model)  # the adapter was trained on the 4-bit weights
        return model.eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _with_adapters(model, paths: tuple[str, ...]):
    """Merges all adapters but the last, rounding once at the end, and attaches the last."""
    flag, types = "--adapter or --model_path", types_of(model)
    for number, path in enumerate(paths[:-1], start=2):
        model = merge_onto(model, path, flag, types if number == len(paths) else None).model
    return attach_adapter(model, paths[-1], flag)


def load_for_inference(args: TrainedArgs, parts: Parts, dtype="auto", tokenizer=None):
    """Loads a model and its tokenizer with the chat format it was trained on.

    Args:
        args: the flags, for the messages.
        parts: from `check_trained`.
        dtype: of the weights; "auto" is that of the files.
        tokenizer: from `load_format`, if it is loaded already.

    Returns:
        (model, tokenizer): the tokenizer has a chat template and pads on the left, the model stops at its EOS token.

    Raises:
        UserError: they cannot be loaded, or there is no chat format.
    """
    tokenizer = tokenizer or load_format(args, parts)
    model = load_trained(args, parts, dtype)
    if tokenizer.eos_token_id is not None:
        stop_at_eos(model, tokenizer)  # adapters from elsewhere have no generation_config.json
    return model, tokenizer


def load_format(args: TrainedArgs, parts: Parts):
    """Loads the tokenizer alone, with the chat format of `--template_name` or the one saved with the model.

    Raises:
        UserError: it cannot be loaded, or there is no chat format.
    """
    from utils.runtime.log import route_library_logs

    route_library_logs()
    home = parts.last()
    if not (Path(home) / "tokenizer_config.json").is_file() and parts.adapters:
        logger.info("{} has no tokenizer; the base's is used", home)
        home = parts.base
    tokenizer = load_tokenizer(home, args.trust_remote_code, flag="--model_path")
    if not args.template_name and not tokenizer.chat_template:
        raise UserError(
            f"--model_path {args.model_path!r} has no chat format of its own; give one with --template_name, "
            "or the folder of a run"
        )
    if args.template_name:
        apply_chat_format(tokenizer, get_template(args.template_name, tokenizer, thinking=args.thinking))
    else:
        chat_templates_of(tokenizer)  # refused where none of several is the default
        set_thinking(tokenizer, args.thinking)
    tokenizer.padding_side = "left"  # generation continues at the end of the prompt
    return tokenizer
