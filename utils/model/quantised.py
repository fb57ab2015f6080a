"""Checks and loads bases that are saved quantised, by their config.json, before any weights are loaded."""

import json
from pathlib import Path

from loguru import logger

from utils.model.adapter import adapter_of, names_where
from utils.model.base_config import load_config
from utils.runtime.errors import Problem, refusal

_GIVE = "give the model it was made from, or one saved in 4 bits by bitsandbytes, as --model_name_or_path"


def quantisation_of(path: str, download: bool = False) -> dict | None:
    """Reads the `quantization_config` of a model's config.json; None if there is none, or config.json cannot be read.

    `{"quant_method": "bitsandbytes", "load_in_4bit": True, …}`

    Args:
        path: a folder, or a name on the Hub.
        download: whether the file may be downloaded; else only a cached copy is read.
    """
    try:
        if Path(path).expanduser().is_dir():
            file = Path(path).expanduser() / "config.json"
        else:
            from transformers.utils import cached_file

            file = Path(cached_file(path, "config.json", local_files_only=not download))
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # loading the model gives a better error
        return None
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    for part in filter(lambda part: isinstance(part, dict), parts):
        found = part.get("quantization_config") or part.get("compression_config")
        if isinstance(found, dict):
            return found
    return None


def method_of(quantisation: dict) -> str:
    """`bitsandbytes_4bit`, `bitsandbytes_8bit`, `mxfp4`, `gptq`, …: transformers' names."""
    for bits in (4, 8):
        if quantisation.get(f"load_in_{bits}bit"):
            return f"bitsandbytes_{bits}bit"
    return str(quantisation.get("quant_method", "in an unnamed way"))


def resolve_base(common, download: bool = False) -> None:
    """Replaces `--train_mode lora` by its 4-bit mode, qlora, if bitsandbytes saved the base in 4 bits.

    Args:
        common: CommonArgs.
        download: as for `quantisation_of`.
    """
    quantisation = quantisation_of(common.model_name_or_path, download)
    if quantisation is None or check_base(common, download):
        return
    base, method = f"--model_name_or_path {common.model_name_or_path!r}", method_of(quantisation)
    mode, instead = common.train_mode, adapter_of(common).on_4_bit_base
    if method == "bitsandbytes_4bit" and instead not in (None, mode):
        common.train_mode = instead
        logger.info("{} is saved in 4 bits, so --train_mode {} is {} here", base, mode, instead)
    elif method == "mxfp4":
        logger.info("{} is saved in MXFP4; its experts are unpacked, to 2 bytes a weight (4 with full)", base)


def check_base(common, download: bool = False) -> list[Problem]:
    """Checks that the base can be trained as it is saved; returns the problems.

    Args:
        common: CommonArgs.
        download: as for `quantisation_of`.
    """
    quantisation = quantisation_of(common.model_name_or_path, download)
    if quantisation is None:
        return []
    base, method = f"--model_name_or_path {common.model_name_or_path!r}", method_of(quantisation)
    row, mode = adapter_of(common), common.train_mode
    if method == "bitsandbytes_4bit" and row.on_4_bit_base is None:
        cannot = "is not trained on" if row.is_adapter else "cannot change"
        return refusal(
            f"--train_mode {mode} {cannot} the weights of {base}, which are saved in 4 bits (bitsandbytes); use "
            f"--train_mode {names_where(lambda row: row.quantised)}, or give the model it was made from",
            "train_mode",
            "model_name_or_path",
        )
    if method == "bitsandbytes_4bit" and common.init_lora_weights == "pissa":
        return refusal(
            f"--init_lora_weights pissa factorises the base's weights, and {base} is saved in 4 bits; leave the "
            "flag out, or give the model it was made from",
            "init_lora_weights",
            "model_name_or_path",
        )
    if method == "mxfp4" and row.quantised:
        plain = names_where(lambda row: row.is_adapter and not row.quantised)
        return refusal(
            f"--train_mode {mode} quantises whole weights, and {base} is saved in MXFP4; use --train_mode {plain}, "
            "which unpacks them to 16 bits, or give the model in 16 bits",
            "train_mode",
            "model_name_or_path",
        )
    if method in ("bitsandbytes_4bit", "mxfp4"):
        return []
    what = "in 8 bits (bitsandbytes)" if method == "bitsandbytes_8bit" else f"quantised ({method})"
    return refusal(f"{base} is saved {what}, which is not trained here; {_GIVE}", "model_name_or_path")


def loading_options(args, compute_dtype) -> dict:
    """The arguments of `from_pretrained` for a base that is saved quantised; empty for others.

    Args:
        args: CommonArgs, accepted by `check_base`.
        compute_dtype: of the run; bitsandbytes would use the one saved with the base.
    """
    quantisation = quantisation_of(args.model_name_or_path)
    if quantisation is None:
        return {}
    from transformers import Mxfp4Config

    if method_of(quantisation) == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    config = load_config(args.model_name_or_path, args.trust_remote_code)
    found = quantisation | {"bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch.")}
    holders = (config, config.get_text_config())
    next(part for part in holders if getattr(part, "quantization_config", None)).quantization_config = found
    return {"config": config, "quantization_config": None}


def forget_unpacking(model) -> None:
    """Lets weights that were dequantised from MXFP4 be saved with their own names.

    transformers 5.23 would reverse the renaming of the packed weights when it saves, and name them `…_blocks`. Loading
    would not find them, and initialise the experts at random.
    """
    if not getattr(model, "is_quantized", False) and getattr(model.config, "quantization_config", None) is None:
        model._weight_conversions = None  # transformers then uses those of the architecture


def is_stored_in_bytes(args) -> bool:
    """Whether the base's 4-bit weights are stored as integers, as is usual, which ZeRO-3 and FSDP cannot shard."""
    quantisation = quantisation_of(args.model_name_or_path) or {}
    storage = quantisation.get("bnb_4bit_quant_storage", "uint8")
    return method_of(quantisation) == "bitsandbytes_4bit" and "int" in str(storage)
