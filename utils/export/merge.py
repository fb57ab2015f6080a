"""Merges adapters into their base: each layer in float32, rounded once at the end, and checked against the adapter."""

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

from loguru import logger

from utils.export.arguments import MergeArgs
from utils.export.merge_folder import atomic_folder, read_merged
from utils.export.modelfile import NAME, has_go_form, template_in, write_modelfile
from utils.export.tensors import absent_tensors, keep_types, load_exactly, main_type
from utils.infer.load import Parts, TrainedArgs
from utils.model.base_config import refuse_unloadable
from utils.model.load import fix_generation_config
from utils.model.merge_check import compare, logits_in_float32, refuse_difference
from utils.model.merge_layers import Merged, Rounding, merge_onto, types_of
from utils.model.rope import scaling_of_adapters, scaling_options
from utils.model.source import given_model
from utils.model.tokenizer import load_tokenizer, save_chat_format
from utils.patches.lazy_imports import import_peft, skip_deepspeed_import
from utils.runtime.errors import UserError, load_failure
from utils.storage.files import sha256_of, write_json
from utils.storage.run_folder import MERGED, RECORD_FILE, files_in, read_run_note
from utils.storage.weights import weights_fingerprint
from utils.tasks import TASKS
from utils.template import get_template
from utils.template.thinking import set_thinking


def load_merged(args: TrainedArgs, parts: Parts, dtype: str | None = None) -> Merged:
    """Loads a base and merges its adapters into it on the CPU; each merge is compared with the unmerged adapter.

    The layers that an adapter changes are kept in float32 until they are compared if there is enough free memory, else
    one layer at a time, so that a 7B in bf16 needs little more than its 14 GB. With several adapters they stay in
    float32 until the last is merged.

    Args:
        args: the flags, for the messages.
        parts: from `check_trained`, with at least one adapter.
        dtype: of the result, a key of `utils.storage.weights.DTYPES`, for weights in the base's main dtype. Weights in
            another dtype keep it, and without `dtype` all do.

    Raises:
        UserError: base or adapter cannot be loaded, do not fit each other, or merge to weights that are not finite or
            that give other logits.
    """
    model, main = _load_base(args, parts)
    import torch

    types = types_of(model)
    if dtype:
        usual = getattr(torch, main)
        types = {name: getattr(torch, dtype) if kind == usual else kind for name, kind in types.items()}
        model.config.dtype = getattr(torch, dtype)
    rounding = Rounding()
    for adapter in parts.adapters:
        last = adapter is parts.adapters[-1]
        merged = merge_onto(model, adapter, "--model_path or --adapter", types if last else None, rounding)
        model = merged.model
    rounding.report(dtype or main)
    return merged


def _load_base(args: TrainedArgs, parts: Parts) -> tuple[Any, str]:
    """Loads the base with each tensor in the dtype of its file; returns it with its main dtype."""
    import_peft()
    main = main_type(parts.base)
    options = {"dtype": main or "auto", "trust_remote_code": args.trust_remote_code, "use_safetensors": True}
    flag = "--base_model" if args.base_model else "--model_path"
    options |= scaling_options(parts.base, scaling_of_adapters(parts.adapters), args.trust_remote_code, flag)
    remedy = "keep the adapter, which infer and evaluate load as it is"
    refuse_unloadable(parts.base, flag, args.trust_remote_code, remedy)
    try:
        model, info = auto_class_of(parts).from_pretrained(parts.base, output_loading_info=True, **options)
    except Exception as error:  # the hub, the file system and the model code each raise their own
        raise UserError(load_failure("base model", flag, parts.base, error)) from error
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        # transformers 5.23 would initialise them at random, and only warn
        raise UserError(f"the base {parts.base!r} lacks weights, such as {lacking[0]}; give a complete one as {flag}")
    loaded = str(model.dtype).removeprefix("torch.")
    load_exactly(model, parts.base)
    return model, main_type(parts.base) or loaded


def auto_class_of(parts: Parts) -> type:
    """The transformers class that loads the model: the auto class of the task it was last trained for, if recorded."""
    import transformers

    task = read_run_note(parts.last(), "common").get("task_type")
    return getattr(transformers, TASKS[task].auto_class if task in TASKS else "AutoModelForCausalLM")


def compare_saved(folder: Path, merged: Merged, args: TrainedArgs, parts: Parts) -> str:
    """Loads a merged model's files and compares their logits with the adapter's.

    Args:
        folder: what was saved.
        merged: from `load_merged`; its `model` is not needed.
        args, parts: as for `load_merged`.

    Returns:
        the result, for the log.

    Raises:
        UserError: the logits differ.
    """
    if merged.adapter is None:
        return "not compared"
    options = {"dtype": "auto", "trust_remote_code": args.trust_remote_code, "use_safetensors": True}
    model = auto_class_of(parts).from_pretrained(folder, **options)
    load_exactly(model, str(folder))
    found = logits_in_float32(model, merged.ids)
    # the merged model was compared with these very weights, so only float32 rounding is tolerated
    compared = compare(merged.base, merged.merged, found)
    refuse_difference(compared, "float32", "the merged model, loaded from its files,", parts.last())
    return compare(merged.base, merged.adapter, found).text()


def merge(args: MergeArgs, parts: Parts) -> Path:
    """Merges the adapters and writes the model into `--output_dir`, completely or not at all.

    Returns:
        the folder.

    Raises:
        UserError: something cannot be loaded, merged or written, or the chat format cannot be written as a Modelfile.
    """
    skip_deepspeed_import()  # save_pretrained would import it to ask for ZeRO-3
    folder = Path(args.output_dir).expanduser().resolve()
    tokenizer = load_tokenizer(_tokenizer_folder(parts), args.trust_remote_code, flag="--model_path")
    if not args.template_name:
        set_thinking(tokenizer, args.thinking)
    template = _template(args, tokenizer, parts)
    merged = load_merged(args, parts, args.dtype)
    merged.model.generation_config = _generation_config(parts, merged.model)
    fix_generation_config(merged.model)
    if args.template_name:
        save_chat_format(tokenizer, get_template(args.template_name, tokenizer, thinking=args.thinking), merged.model)
    with atomic_folder(folder, f"--output_dir {args.output_dir!r}") as part:
        _write_model(args, parts, merged.model, part)
        _write_tokenizer(args, parts, tokenizer, template, merged.model, part)
        merged = merged._replace(model=None)  # frees the memory for the model that is loaded from the files
        compared = compare_saved(part, merged, args, parts)
        _write_merge_record(parts, part, args.dtype or main_type(parts.base))
    logger.info("the merged files against base and adapter: {}", compared)
    return folder


def _write_model(args: MergeArgs, parts: Parts, model, folder: Path) -> None:
    """Writes weights and configuration, each tensor in its final dtype."""
    model.save_pretrained(folder, max_shard_size=args.max_shard_size)
    if absent := absent_tensors(model, folder, parts.base):
        logger.warning(
            "{:,} tensors of the base are not in the merged model, since transformers does not load them: {}",
            len(absent),
            ", ".join(absent[:3]) + ", …" * (len(absent) > 3),
        )
    keep_types(folder, parts.base, main_type(parts.base) if args.dtype else None)


def _write_tokenizer(args: MergeArgs, parts: Parts, tokenizer, template, model, folder: Path) -> None:
    """Writes the tokenizer and what states the chat format: a Modelfile on request, and the run's settings."""
    tokenizer.save_pretrained(folder)
    # SentencePiece's file, which converters to GGUF read and transformers 5.23 does not save
    if vocabulary := _file_of(parts.base, "tokenizer.model"):
        shutil.copyfile(vocabulary, folder / "tokenizer.model")
    if args.modelfile:
        write_modelfile(folder, template, tokenizer, model.generation_config.eos_token_id)
    found = template.name if template else "auto" if tokenizer.chat_template else None
    _write_settings(parts, folder, args.template_name or _trained_template(parts) or found)


def _tokenizer_folder(parts: Parts) -> str:
    """The folder to load the tokenizer from: the last adapter's if it has one, else the base's."""
    has_one = (Path(parts.last()) / "tokenizer_config.json").is_file() or not parts.adapters
    return parts.last() if has_one else parts.base


def _template(args: MergeArgs, tokenizer, parts: Parts):
    """The model's chat format as a Template; None if its Jinja template has no such form.

    Raises:
        UserError: there is none, and `--modelfile` needs it.
    """
    if args.template_name and args.template_name != "auto":
        template = get_template(args.template_name, tokenizer, thinking=args.thinking)
    else:
        template = template_in(tokenizer, _trained_template(parts))
    if args.modelfile and not has_go_form(template):
        has = "cannot be written in Go's syntax" if template or tokenizer.chat_template else "is not saved with it"
        named = args.template_name not in (None, "auto")
        which = f"--template_name {args.template_name}" if named else f"the format of --model_path {args.model_path!r}"
        raise UserError(
            f"--modelfile true: {which} {has} (it may print a date, leave "
            "out earlier thinking, or have no special token before a turn). Give a registered format that the model "
            "was trained on as --template_name, or leave --modelfile out: convert_hf_to_gguf.py of llama.cpp reads the "
            "format as it is"
        )
    return template


def _trained_template(parts: Parts) -> str | None:
    return read_run_note(parts.last(), "common").get("template_name")


def _generation_config(parts: Parts, model):
    """The run's generation config with its stop tokens, or else the base's."""
    from transformers import GenerationConfig

    if (Path(parts.last()) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(parts.last())
    return model.generation_config


def _file_of(model: str, name: str) -> str | None:
    """The path of a file of a model, in its folder or in the Hub's cache; None if there is none."""
    from transformers.utils import cached_file

    try:
        return cached_file(model, name, local_files_only=True)
    except OSError:
        return None


def _write_settings(parts: Parts, folder: Path, template_name: str | None) -> None:
    """Writes the last run's settings: a training that starts from the merged model takes its chat format from them."""
    file = Path(parts.last()) / RECORD_FILE
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"common": {}}
    if template_name:
        values["common"]["template_name"] = template_name
    write_json(folder / RECORD_FILE, values)


def _write_merge_record(parts: Parts, folder: Path, dtype: str) -> None:
    """Writes the record of the merge: base, adapters and files. It is written last."""
    adapters = [{"path": path, "sha256": sha256_of(f"{path}/adapter_model.safetensors")} for path in parts.adapters]
    write_json(
        folder / MERGED,
        {
            "base": {"path": given_model(parts.base), "fingerprint": weights_fingerprint(parts.base)},
            "adapters": adapters,
            "dtype": dtype,
            "fingerprint": weights_fingerprint(folder),
            "files": {name: size for name, size in files_in(folder).items() if not name.startswith(".")},
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        },
    )


def add_modelfile(args: MergeArgs, parts: Parts) -> Path:
    """Writes a Modelfile into a folder of full weights; returns the folder."""
    folder = Path(parts.base)
    tokenizer = load_tokenizer(parts.base, args.trust_remote_code, flag="--model_path")
    file = folder / "generation_config.json"
    stops = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    write_modelfile(folder, _template(args, tokenizer, parts), tokenizer, stops)
    record = read_merged(folder)
    if isinstance(record.get("files"), dict):
        changed = (NAME, "tokenizer_config.json")
        record["files"] |= {name: size for name, size in files_in(folder).items() if name in changed}
        write_json(folder / MERGED, record)
    if list(folder.glob("*/model*.safetensors")):
        logger.warning(
            "ollama create also reads weights in subfolders of {}; move its checkpoints elsewhere first", folder
        )
    return folder
