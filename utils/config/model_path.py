"""Checks that a path is a model: a folder that transformers saved, a GGUF file, a short name, or a name on a hub."""

import json
import os
import re
from pathlib import Path

from utils.model.adapter import adapter_of, names_where
from utils.model.base_config import load_config
from utils.model.named_models import MODELS, listed
from utils.model.new_tokens import read_new_tokens
from utils.model.quantised import check_base, resolve_base
from utils.model.rope import check_scaling, parse_rope_scaling
from utils.model.source import check_source, is_source
from utils.runtime.errors import Problem, UserError, nearest_path, refusal
from utils.storage.weights import check_weight_files


def resolve(settings) -> None:
    """Sets `--train_mode qlora` for a base that is saved in 4 bits, and reads the file of `--add_tokens`."""
    resolve_base(settings.common)
    resolve_new_tokens(settings.common)


def validate(settings) -> list[Problem]:
    """Checks `--model_name_or_path`, and that its weights can be trained as they are saved."""
    common = settings.common
    problems = check_model_path(
        "--model_name_or_path",
        common.model_name_or_path,
        common.trust_remote_code,
        needs_weights=settings.needs_weights,
    )
    problems += _check_new_tokens(settings)
    return problems + check_base(common) + _check_rope_scaling(common, is_readable=not problems)


def resolve_new_tokens(common) -> None:
    """Writes `--add_tokens` as a JSON object, so that the run's record has what a file holds."""
    if common.add_tokens:
        tokens, problems = read_new_tokens(common.add_tokens)
        common.add_tokens = common.add_tokens if problems else json.dumps(tokens, ensure_ascii=False)


def _check_new_tokens(settings) -> list[Problem]:
    """Checks `--add_tokens` against the other settings."""
    common = settings.common
    if not common.add_tokens:
        return []
    tokens, problems = read_new_tokens(common.add_tokens)
    row = adapter_of(common)
    if row.is_adapter and not row.trains_token_rows:
        problems += refusal(
            f"--add_tokens adds tokens whose embeddings must be trained, and --train_mode {common.train_mode} cannot "
            f"train them; use --train_mode {names_where(lambda row: row.trains_token_rows)}, or full",
            "add_tokens",
            "train_mode",
        )
    return problems


def _check_rope_scaling(common, is_readable: bool) -> list[Problem]:
    """Checks `--rope_scaling`, on the model too where its config.json is on this machine."""
    if common.rope_scaling is None:
        return []
    try:
        parse_rope_scaling(common.rope_scaling)
        if is_readable and (Path(common.model_name_or_path) / "config.json").is_file():
            check_scaling(common.model_name_or_path, common.rope_scaling, common.trust_remote_code)
    except UserError as error:
        return refusal(str(error.problems[0]), "rope_scaling")
    return []


def check_model_path(
    name: str, path: str, trust_remote_code: bool, adapter_allowed: bool = False, needs_weights: bool = True
) -> list[Problem]:
    """Checks that a path is a hub's name, a short name, a GGUF file, or a folder with a model.

    Args:
        name: the flag it came by, or what it is called in messages.
        path: its value.
        trust_remote_code: whether Python code beside the model may run.
        adapter_allowed: whether a folder with an adapter is accepted as well.
        needs_weights: whether there must be weights beside config.json.

    Returns:
        the problems.
    """
    folder = Path(path).expanduser()
    try:
        os.listdir(folder)
        (folder / "config.json").is_file()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # no permission, or a name that is too long
        return refusal(
            f"{name} {path!r} cannot be read: {error.strerror}; choose another folder, or have its owner allow it",
            *_flags(name),
        )
    if is_source(path):
        return check_source(name, path)
    if folder.is_file():
        if folder.suffix == ".gguf":
            return refusal(
                f"{name} {path!r} is not a GGUF file, as its first bytes show; copy or download it again", *_flags(name)
            )
        return refusal(f"{name} {path!r} is a file, and not in GGUF format; give the folder it lies in", *_flags(name))
    if not folder.is_dir():
        return _check_name(name, path, folder.parent, adapter_allowed)
    if adapter_allowed and (folder / "adapter_config.json").is_file():
        return []
    return _check_folder(name, path, folder, trust_remote_code, needs_weights)


def _check_folder(name: str, path: str, folder: Path, trust_remote_code: bool, needs_weights: bool) -> list[Problem]:
    flag = f"{name} {path!r}"
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return refusal(
                f"{flag} has no config.json: it holds an adapter; give it as --adapter_name_or_path",
                *_flags(name),
                "adapter_name_or_path",
            )
        ggufs = sorted(str(file) for file in folder.glob("*.gguf"))
        held = f"GGUF files; give one of them: {', '.join(ggufs[:5])}" if ggufs else "no model saved by transformers"
        return refusal(f"{flag} has no config.json: it holds {held}", *_flags(name))
    if not needs_weights:
        return _check_config(name, path, trust_remote_code)
    if not list(folder.glob("*.safetensors")):
        return refusal(
            f"{flag} has no *.safetensors weights. Other weight files can run code when they are read and are not "
            "loaded; convert them with save_pretrained(...) of transformers",
            *_flags(name),
        )
    return _check_config(name, path, trust_remote_code) or check_weight_files(flag, folder, *_flags(name))


def _flags(name: str) -> list[str]:
    """The flag of a name as messages have it: `"--model_path"` → `["model_path"]`, `"the base"` → `[]`."""
    return [name.removeprefix("--")] if name.startswith("--") else []


def _check_name(name: str, path: str, parent: Path, adapter_allowed: bool) -> list[Problem]:
    """Whether a path that does not exist can be a hub's name."""
    looks_local = (
        path.startswith((".", "/", "~", "\\")) or path.count("/") != 1 or parent.is_dir() or parent.name == "output"
    )
    if looks_local or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        files = ["config.json", *(["adapter_config.json"] if adapter_allowed else [])]
        models = [found for found in _siblings(parent) if any((found / file).is_file() for file in files)]
        models += [] if "/" in path else map(Path, MODELS)
        return refusal(
            f"{name} {path!r} does not exist.{nearest_path(path, models)} Give a model folder, a GGUF file, a short "
            f"name, of which there is {listed()}, or a hub name like Qwen/Qwen1.5-7B",
            *_flags(name),
        )
    return []


def _siblings(parent: Path) -> list[Path]:
    try:
        return list(parent.iterdir())
    except OSError:  # there is no such folder, or it cannot be read
        return []


def _check_config(name: str, path: str, trust_remote_code: bool) -> list[Problem]:
    try:
        load_config(path, trust_remote_code, name)
    except UserError as error:
        return refusal(
            f"{error.problems[0]}. A model with code of its own needs --trust_remote_code true",
            *_flags(name),
            "trust_remote_code",
        )
    return []
