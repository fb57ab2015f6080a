"""Flags of merge_lora, and the checks of them that need no weights."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.config.flags import arg
from utils.export.merge_folder import check_output_dir
from utils.export.modelfile import NAME
from utils.infer.load import Parts, TrainedArgs
from utils.model.adapter_files import check_mergeable
from utils.model.quantised import method_of, quantisation_of
from utils.model.source import is_converted


@dataclass
class MergeArgs(TrainedArgs):
    """Flags of merge_lora."""

    output_dir: str | None = arg(None, "The folder for the merged model: a new or an empty one.")
    overwrite: bool = arg(False, "Replace the files of an earlier merge in --output_dir.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = arg(
        None, "The dtype of the merged weights. Default: that of the base's files."
    )
    max_shard_size: str = arg("5GB", "The largest size of a weight file.")
    modelfile: bool = arg(
        False,
        "Also write a Modelfile for Ollama. For full weights it is written into their folder, and nothing else is.",
    )


def check_merge(args: MergeArgs, parts: Parts | None, readable: bool) -> list:
    """The problems of the flags.

    Args:
        args: the flags.
        parts: base and adapters; None if they could not be found.
        readable: whether their files can be read, so that their size is known.
    """
    problems = _check_shard_size(args.max_shard_size)
    if parts and parts.adapters:
        problems += _check_base_type(parts.base) + [text for path in parts.adapters for text in check_mergeable(path)]
        problems += check_output_dir(args.output_dir, args.overwrite, parts, args.dtype, sized=readable)
    elif parts:
        problems += _check_full_weights(args, parts)
    return problems


def _check_shard_size(size: str) -> list[str]:
    if re.fullmatch(r"[1-9]\d*[KMGT]B", size):
        return []
    return [f"--max_shard_size {size!r} is not a size; give a whole number with its unit, such as 5GB or 500MB"]


def _check_full_weights(args: MergeArgs, parts: Parts) -> list[str]:
    flag = f"--model_path {args.model_path!r}"
    if not args.modelfile:
        return [
            f"{flag} holds full weights, so there is nothing to merge: use it as it is, give adapters for it with "
            "--adapter, or have a Modelfile written into it with --modelfile true"
        ]
    if args.output_dir is not None or args.dtype is not None:
        name = "output_dir" if args.output_dir is not None else "dtype"
        return [f"--{name} {getattr(args, name)!r} is for merging, and {flag} holds full weights; leave it out"]
    folder = Path(parts.base)
    if not folder.is_dir():
        return [f"{flag} is not a folder, so no Modelfile can be written into it; give a folder with the model"]
    if is_converted(parts.base):
        return [
            f"{flag} is kept in {str(folder)!r}, a cache that no Modelfile is written into; copy the folder and give "
            "the copy"
        ]
    if (folder / NAME).exists() and not args.overwrite:
        return [f"{flag} has a {NAME} already; give --overwrite true to replace it"]
    return []


def _check_base_type(base: str) -> list[str]:
    quantisation = quantisation_of(base)
    if quantisation is None:
        return []
    method = method_of(quantisation)
    return [
        f"the base {base!r} is saved quantised ({method}), and an adapter cannot be merged exactly into such weights; "
        "give the model it was quantised from as --base_model (with --allow_other_base true)"
    ]
