"""Adapters merged into their base: each layer in float32, whatever the files hold, and rounded once at the end."""

import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loguru import logger

from utils.errors import UserError, is_about_the_disk
from utils.imports import import_peft
from utils.tokenizer import load_failure
from utils.trained import Parts, TrainedArgs
from utils.weight_files import read_header, weight_files

MERGED = "merged.json"  # written last: a folder that has it holds a merged model
# type → bytes of a weight
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def load_merged(args: TrainedArgs, parts: Parts, dtype: str | None = None):
    """Loads a base and merges its adapters into it, on the CPU.

    Only a layer at a time is held in float32, so that a 7B in bf16 needs little more memory than its 14 GB; of a
    chain every layer that an adapter changes stays in float32 until the last is merged.

    Args:
        args: the flags, for the messages.
        parts: from `check_trained`, with at least one adapter.
        dtype: of the result, a key of `DTYPES`; None for the one the base is saved in.

    Returns:
        transformers.PreTrainedModel

    Raises:
        UserError: base or adapter cannot be loaded, do not fit each other, or give weights that are not finite.
    """
    import_peft()
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": "auto", "trust_remote_code": args.trust_remote_code, "use_safetensors": True}
    flag = "--base_model" if args.base_model else "--model_path"
    try:
        model, info = AutoModelForCausalLM.from_pretrained(parts.base, output_loading_info=True, **options)
    except Exception as error:  # the hub, the file system and the model code each raise their own
        raise UserError(load_failure("base model", flag, parts.base, error)) from error
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        # transformers makes up random ones
        raise UserError(f"the base {parts.base!r} lacks weights, such as {lacking[0]}; give a complete one as {flag}")
    final = getattr(torch, dtype) if dtype else model.dtype
    rounding = Rounding()
    for adapter in parts.adapters:
        last = adapter is parts.adapters[-1]
        model = _merge(model, adapter, final if last else torch.float32, rounding)
    model = model.to(final)
    if final is torch.float16 and not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError("--dtype float16 has no room for the largest of the merged weights; use bfloat16 or float32")
    rounding.report(final)
    return model


def _merge(model, path: str, dtype, rounding: "Rounding"):
    """Merges one adapter; the layers it changes are in `dtype` afterwards."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        peft = PeftModel.from_pretrained(model, path)
    except Exception as error:  # another shape, a damaged file
        raise UserError(load_failure("adapter", "--model_path or --adapter", path, error)) from error
    if not hasattr(peft, "merge_and_unload"):
        kind = peft.peft_config["default"].peft_type.value
        raise UserError(f"adapter {path!r} is of the type {kind}, which changes no weights and cannot be merged")
    try:
        for layer in [module for module in peft.modules() if isinstance(module, BaseTunerLayer)]:
            base = layer.get_base_layer().float()
            before = [weight.detach().clone() for weight in base.parameters()]
            layer.merge(safe_merge=True)
            merged = [weight.detach() for weight in base.parameters()]
            base.to(dtype)
            rounding.add(before, merged, base.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that each layer is merged already
            return peft.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT's word for weights that are not finite
        raise UserError(
            f"adapter {path!r} cannot be merged: {error}. Its training may have diverged; see its train.log, and take "
            "a checkpoint from before"
        ) from error


class Rounding:
    """How much of what training changed is lost when the merged weights are rounded to a smaller type."""

    def __init__(self):
        self.moved = self.lost = 0.0

    def add(self, before, merged, rounded) -> None:
        """Counts one layer's weights; of a chain each adapter's own change."""
        for old, new, kept in zip(before, merged, rounded, strict=True):
            self.moved += float((new - old).double().square().sum())
            self.lost += float((new - kept.detach().float()).double().square().sum())

    def share(self) -> float:
        """|rounding| / |change|, both as the root of the sum of squares."""
        return (self.lost / self.moved) ** 0.5 if self.moved else 0.0

    def report(self, dtype) -> None:
        """Says what was lost, if anything was."""
        if self.lost:
            logger.info(
                "rounding to {} moved the merged weights by {:.2g} % of what training moved them; "
                "--dtype float32 keeps it all, in twice the space",
                str(dtype).removeprefix("torch."),
                100 * self.share(),
            )


def size_of(base: str, dtype: str | None) -> int:
    """The bytes of a base's weights in another type, or in their own; 0 where they are not on this machine."""
    entries = [entry for file in weight_files(base) for entry in read_header(file)[0].values()]
    if dtype:
        return sum(DTYPES[dtype] * math.prod(entry["shape"]) for entry in entries)
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)


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
    existing = next(parent for parent in folder.parents if parent.is_dir())
    try:
        # only a real attempt tells: permissions, a read-only disk, a full one
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        return [f"{flag} cannot be written: {error.strerror} ({existing}); give another folder"]
    needed, free = size_of(parts.base, dtype) if sized else 0, shutil.disk_usage(existing).free
    if needed > free:
        return [
            f"{flag} needs about {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free; make room, give a "
            "folder on another disk, or a smaller --dtype"
        ]
    return []


@contextmanager
def whole_or_nothing(folder: Path, flag: str) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once all is written.

    What fails or is interrupted leaves nothing behind, and an earlier `folder` as it was.

    Args:
        folder: where it shall be.
        flag: the flag it came by, with its value.

    Raises:
        UserError: the disk is full, or refuses.
    """
    # beside it, so that a rename brings it there; always the same names, so that the next try finds a killed one's
    part, old = (folder.with_name(f".{folder.name}.{ending}") for ending in ("part", "old"))
    try:
        _put_back(old, folder)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except Exception as error:
        if not is_about_the_disk(error):
            raise
        raise UserError(
            f"{flag} cannot be written: {error}. Nothing is left of it; make room, or give another folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _put_back(old, folder)


def _put_back(old: Path, folder: Path) -> None:
    """What stood in the folder's place comes back, unless a whole folder stands there."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_json(file: Path, values: dict) -> None:
    """Writes a file for people to read."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
