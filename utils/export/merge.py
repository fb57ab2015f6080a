"""Adapters merged into their base: each layer in float32, whatever the files hold, and rounded once at the end."""

import shutil
from pathlib import Path
from typing import Any

from utils.export.merge_files import load_exactly, main_type
from utils.export.merge_folder import foreign_to_merge
from utils.infer.load import Parts, TrainedArgs
from utils.model.base_config import refuse_unloadable
from utils.model.merge_check import compare, logits_in_float32, refuse_difference
from utils.model.merge_layers import Merged, Rounding, merge_onto, types_of
from utils.patches.lazy_imports import import_peft
from utils.runtime.errors import UserError, load_failure
from utils.storage.files import existing_parent, write_refusal
from utils.storage.run_folder import MERGED
from utils.storage.weights import weights_size


def load_merged(args: TrainedArgs, parts: Parts, dtype: str | None = None) -> Merged:
    """Loads a base and merges its adapters into it, on the CPU; each merge is compared with the adapter unmerged.

    The layers that an adapter changes are held in float32 until they are compared, where the free memory has room for
    it; else one layer at a time, so that a 7B in bf16 needs little more than its 14 GB. Of a chain they stay in float32
    until the last is merged.

    Args:
        args: the flags, for the messages.
        parts: from `check_trained`, with at least one adapter.
        dtype: of the result, a key of `DTYPES`: for the weights that have the base's usual type. Those that its files
            hold in another, and all without `dtype`, keep their type.

    Raises:
        UserError: base or adapter cannot be loaded, do not fit each other, give weights that are not finite, or other
            logits when they are merged.
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
    """The base in the type that most of its files' bytes have, with other types where the files have others."""
    import_peft()
    from transformers import AutoModelForCausalLM

    main = main_type(parts.base)
    options = {"dtype": main or "auto", "trust_remote_code": args.trust_remote_code, "use_safetensors": True}
    flag = "--base_model" if args.base_model else "--model_path"
    remedy = "keep the adapter, which infer and evaluate load as it is"
    refuse_unloadable(parts.base, flag, args.trust_remote_code, remedy)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(parts.base, output_loading_info=True, **options)
    except Exception as error:  # the hub, the file system and the model code each raise their own
        raise UserError(load_failure("base model", flag, parts.base, error)) from error
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        # transformers makes up random ones
        raise UserError(f"the base {parts.base!r} lacks weights, such as {lacking[0]}; give a complete one as {flag}")
    loaded = str(model.dtype).removeprefix("torch.")
    load_exactly(model, parts.base)
    return model, main_type(parts.base) or loaded


def compare_saved(folder: Path, merged: Merged, adapter: str, trust_remote_code: bool) -> str:
    """Loads a merged model's files and compares their logits with the adapter's.

    Args:
        folder: what was saved.
        merged: from `load_merged`; its `model` may be let go before.
        adapter: the last adapter's folder.

    Returns:
        what the comparison gave, for the log.

    Raises:
        UserError: the logits are others.
    """
    if merged.adapter is None:
        return "not compared"
    from transformers import AutoModelForCausalLM

    options = {"dtype": "auto", "trust_remote_code": trust_remote_code, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    load_exactly(model, str(folder))
    found = logits_in_float32(model, merged.ids)
    # the files hold the weights that were compared already, bit by bit, so that nothing is left to rounding
    compared = compare(merged.base, merged.merged, found)
    refuse_difference(compared, "float32", "the merged model, loaded from its files,", adapter)
    return compare(merged.base, merged.adapter, found).text()


def check_output_dir(path: str | None, overwrite: bool, parts: Parts, dtype: str | None, sized: bool) -> list[str]:
    """The problems of a folder to write a merged model into.

    Args:
        path: its `--output_dir`.
        overwrite: whether an earlier merge there may be replaced.
        parts: what is merged.
        dtype: of the result, as for `load_merged`.
        sized: whether the room it takes can be told.
    """
    if not path:
        return ["--output_dir is missing; give a new folder for the merged model"]
    flag, folder = f"--output_dir {path!r}", Path(path).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        return [f"{flag} is a file; give a folder"]
    for source in map(Path, (parts.base, *parts.adapters)):
        if source.is_dir() and folder in (source.resolve(), *source.resolve().parents):
            return [f"{flag} is or holds {str(source)!r}, which is to be merged; give another folder"]
    held = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if held and MERGED not in held:
        return [f"{flag} holds {held[0]!r}, which no merge has left there; give a new or an empty folder"]
    if held and not overwrite:
        return [f"{flag} holds a merged model; give another folder, or --overwrite true to replace it"]
    if foreign := foreign_to_merge(folder):
        return [
            f"{flag} holds {foreign[0]!r}, which no merge wrote, or which was changed since, and --overwrite true "
            "replaces nothing but a merge; move it away, or give another folder"
        ]
    if reason := write_refusal(folder.parent):
        return [f"{flag} cannot be written: {reason}; give another folder"]
    needed, free = (
        weights_size(parts.base, dtype) if sized else 0,
        shutil.disk_usage(existing_parent(folder.parent)).free,
    )
    if needed > free:
        return [
            f"{flag} needs about {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free; make room, give a "
            "folder on another disk, or a smaller --dtype"
        ]
    return []
