"""Merges a trained adapter into its base: whole weights that load without PEFT, and a Modelfile for Ollama.

python -m utils.script.merge_lora --model_path output/sft-20260101-120000 --output_dir output/merged
python -m utils.script.merge_lora --model_path output/merged --modelfile true
"""

import importlib.metadata
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loguru import logger

from utils.config.flags import arg, make_parser, read_flags
from utils.export.merge import check_output_dir, compare_saved, load_merged
from utils.export.merge_files import keep_types, main_type
from utils.export.merge_folder import read_merged, whole_or_nothing
from utils.export.modelfile import NAME, template_in, write_modelfile
from utils.infer.load import Parts, TrainedArgs, check_trained
from utils.model.adapter_files import check_mergeable
from utils.model.load import settle_generation
from utils.model.quantised import method_of, quantisation_of
from utils.model.tokenizer import load_tokenizer, save_chat_format
from utils.patches.lazy_imports import skip_deepspeed_import
from utils.runtime.command import run_command
from utils.runtime.errors import UserError, raise_if_any
from utils.runtime.log import route_library_logs, setup_logging
from utils.storage.files import sha256_of, write_json
from utils.storage.run_folder import MERGED, RECORD_FILE, files_in, read_run_note
from utils.storage.run_lock import hold_lock, lock_path_for
from utils.storage.weights import weights_fingerprint
from utils.template import get_template


@dataclass
class MergeArgs(TrainedArgs):
    """Flags of this command."""

    output_dir: str | None = arg(None, "Where the merged model goes: a new or an empty folder.")
    overwrite: bool = arg(False, "Replace what an earlier merge left in --output_dir.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = arg(
        None, "The type of the merged weights. Default: the one the base is saved in."
    )
    max_shard_size: str = arg("5GB", "The largest weight file.")
    modelfile: bool = arg(False, "Also write a Modelfile; of whole weights, nothing but that, into their own folder.")


def parse(argv: list[str] | None = None) -> tuple[MergeArgs, Parts]:
    """Reads the flags.

    Returns:
        the flags, and the base and adapters they mean.

    Raises:
        UserError: with every problem at once.
    """
    values, _, problems = read_flags(make_parser([MergeArgs], "utils.script.merge_lora", __doc__), argv)
    args = MergeArgs(**values)
    parts, found = check_trained(args)
    problems += found + _check_shard_size(args.max_shard_size)
    if parts and not parts.adapters:
        problems += _check_whole(args, parts)
    elif parts:
        problems += _check_base_type(parts.base) + [text for path in parts.adapters for text in check_mergeable(path)]
        # files that are damaged have been named already, and their size cannot be told
        problems += check_output_dir(args.output_dir, args.overwrite, parts, args.dtype, sized=not found)
    raise_if_any(problems)
    return args, parts


def _check_shard_size(size: str) -> list[str]:
    if re.fullmatch(r"[1-9]\d*[KMGT]B", size):
        return []
    return [f"--max_shard_size {size!r} is not a size; give a whole number with its unit, such as 5GB or 500MB"]


def _check_whole(args: MergeArgs, parts: Parts) -> list[str]:
    flag = f"--model_path {args.model_path!r}"
    if not args.modelfile:
        return [
            f"{flag} holds whole weights, so there is nothing to merge: use it as it is, give adapters for it with "
            "--adapter, or have a Modelfile written into it with --modelfile true"
        ]
    if args.output_dir is not None or args.dtype is not None:
        name = "output_dir" if args.output_dir is not None else "dtype"
        return [f"--{name} {getattr(args, name)!r} is for merging, and {flag} holds whole weights; leave it out"]
    folder = Path(parts.base)
    if not folder.is_dir():
        return [f"{flag} is not a folder, so no Modelfile can be written into it; give a folder with the model"]
    if (folder / NAME).exists() and not args.overwrite:
        return [f"{flag} has a {NAME} already; give --overwrite true to replace it"]
    return []


def _check_base_type(base: str) -> list[str]:
    quantisation = quantisation_of(base)
    if quantisation is None:
        return []
    method = method_of(quantisation)
    return [
        f"the base {base!r} is saved quantised ({method}), and weights of that type cannot take an adapter in exactly; "
        "give the model it was made from as --base_model (with --allow_other_base true)"
    ]


def merge(args: MergeArgs, parts: Parts) -> Path:
    """Writes the merged model into `--output_dir`: whole, or not at all.

    Returns:
        the folder.

    Raises:
        UserError: something cannot be loaded, merged or written, or `--modelfile` knows no form of the chat format.
    """
    skip_deepspeed_import()  # saving asks whether the weights are in its hands
    folder = Path(args.output_dir).expanduser().resolve()
    tokenizer = load_tokenizer(_home(parts), args.trust_remote_code, flag="--model_path")
    template = _template(args, tokenizer, parts)
    merged = load_merged(args, parts, args.dtype)
    model, dtype = merged.model, args.dtype or main_type(parts.base)
    model.generation_config = _generation_config(parts, model)
    settle_generation(model)
    if args.template_name:
        save_chat_format(tokenizer, get_template(args.template_name, tokenizer), model)
    with whole_or_nothing(folder, f"--output_dir {args.output_dir!r}") as part:
        model.save_pretrained(part, max_shard_size=args.max_shard_size)
        keep_types(part, parts.base, main_type(parts.base) if args.dtype else None)
        tokenizer.save_pretrained(part)
        # SentencePiece's own file, which the converters to GGUF read and transformers does not write
        if vocabulary := _file_of(parts.base, "tokenizer.model"):
            shutil.copyfile(vocabulary, part / "tokenizer.model")
        if args.modelfile:
            write_modelfile(part, template, tokenizer, model.generation_config.eos_token_id)
        found = template.name if template else "auto" if tokenizer.chat_template else None
        _write_settings(parts, part, args.template_name or _trained_template(parts) or found)
        merged, model = merged._replace(model=None), None  # room for the saved one
        compared = compare_saved(part, merged, parts.last(), args.trust_remote_code)
        _write_origin(parts, part, dtype)
    logger.info("the merged files against base and adapter: {}", compared)
    return folder


def _home(parts: Parts) -> str:
    """The folder whose tokenizer is the model's."""
    has_one = (Path(parts.last()) / "tokenizer_config.json").is_file() or not parts.adapters
    return parts.last() if has_one else parts.base


def _template(args: MergeArgs, tokenizer, parts: Parts):
    """The format the model speaks, None where it has no other form; it must have one where `--modelfile` is given."""
    if args.template_name and args.template_name != "auto":
        return get_template(args.template_name, tokenizer)
    template = template_in(tokenizer, _trained_template(parts))
    if args.modelfile and template is None:
        has = "has no form in Go's syntax that renders alike" if tokenizer.chat_template else "is not saved with it"
        raise UserError(
            f"--modelfile true: the chat format of --model_path {args.model_path!r} {has} (it may print a date, leave "
            "out earlier thinking, or have no special token before a turn). Name a registered format that the model "
            "was trained in with --template_name, or leave --modelfile out: "
            "convert_hf_to_gguf.py of llama.cpp takes the format as it is"
        )
    return template


def _trained_template(parts: Parts) -> str | None:
    return read_run_note(parts.last(), "common").get("template_name")


def _generation_config(parts: Parts, model):
    """The run's own, with its stop tokens, or the base's."""
    from transformers import GenerationConfig

    if (Path(parts.last()) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(parts.last())
    return model.generation_config


def _file_of(model: str, name: str) -> str | None:
    """A file of a folder, or of what a hub's name was downloaded to."""
    from transformers.utils import cached_file

    try:
        return cached_file(model, name, local_files_only=True)
    except OSError:
        return None


def _write_settings(parts: Parts, folder: Path, template_name: str | None) -> None:
    """The last run's settings, by which a training that starts from the folder finds its chat format."""
    file = Path(parts.last()) / RECORD_FILE
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"common": {}}
    if template_name:
        values["common"]["template_name"] = template_name
    write_json(folder / RECORD_FILE, values)


def _write_origin(parts: Parts, folder: Path, dtype: str) -> None:
    """What the folder was merged of; written last."""
    adapters = [{"path": path, "sha256": sha256_of(f"{path}/adapter_model.safetensors")} for path in parts.adapters]
    write_json(
        folder / MERGED,
        {
            "base": {"path": parts.base, "fingerprint": weights_fingerprint(parts.base)},
            "adapters": adapters,
            "dtype": dtype,
            "fingerprint": weights_fingerprint(folder),
            "files": {name: size for name, size in files_in(folder).items() if not name.startswith(".")},
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        },
    )


def add_modelfile(args: MergeArgs, parts: Parts) -> Path:
    """Writes a Modelfile into a folder of whole weights; returns the folder."""
    folder = Path(parts.base)
    tokenizer = load_tokenizer(parts.base, args.trust_remote_code, flag="--model_path")
    file = folder / "generation_config.json"
    stops = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    write_modelfile(folder, _template(args, tokenizer, parts), tokenizer, stops)
    noted = read_merged(folder)
    if isinstance(noted.get("files"), dict):
        changed = (NAME, "tokenizer_config.json")
        noted["files"] |= {name: size for name, size in files_in(folder).items() if name in changed}
        write_json(folder / MERGED, noted)
    if list(folder.glob("*/model*.safetensors")):
        logger.warning(
            "ollama create reads the weights in folders below {} as well; move its checkpoints away before", folder
        )
    return folder


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args, parts = parse(argv)
    route_library_logs()
    if parts.adapters:
        with hold_lock(lock_path_for(args.output_dir), f"--output_dir {args.output_dir!r}"):
            raise_if_any(check_output_dir(args.output_dir, args.overwrite, parts, args.dtype, sized=False))
            folder = merge(args, parts)
    else:
        folder = add_modelfile(args, parts)
    said = ["merged: {}", "talk to it:\n  python -m utils.script.infer --model_path {}"] if parts.adapters else []
    said += ["make an Ollama model of it:\n  ollama create my-model -f {}/" + NAME] if args.modelfile else []
    logger.info("\n".join(said).replace("{}", "{0}"), folder)


if __name__ == "__main__":
    run_command(main)
