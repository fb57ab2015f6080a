"""Converts a GGUF file into a folder as transformers saves it: safetensors, tokenizer, chat template.

The folder is kept beside the Hub's cache, in `$HF_HOME/llm_dojo/models`, named by the file's SHA-256. Everything that
takes a model's folder then works with it as with any other.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from loguru import logger

from utils.model.gguf_file import gguf_config, linked, other_split, read_gguf, split_digits
from utils.runtime.command import run_command
from utils.runtime.errors import ERROR_FILE, Problem, UserError, load_failure, read_problems, refusal
from utils.storage.files import ROOT, existing_parent, sha256_of, write_json
from utils.storage.run_folder import files_in
from utils.storage.weights import DTYPES

NOTE = "source.json"  # in a converted folder, written last: what it was made from, and its files
_DIGITS = 16  # of the SHA-256 in the folder's name


def models_folder() -> Path:
    """The folder of all converted models."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME).expanduser() / "llm_dojo" / "models"


def folder_name(stem: str, sha256: str) -> str:
    """`folder_name("smollm2", "b179…")` → `"smollm2-b179c9523d0e6a0f"`"""
    return f"{stem}-{sha256[:_DIGITS]}"


def gguf_folder(path: str | Path) -> Path:
    """The folder that a GGUF file is converted to, whether it exists or not.

    Raises:
        UserError: the file cannot be read.
    """
    file = Path(path).expanduser().resolve()
    try:
        stat = file.stat()
        sha256 = _sha256(str(file), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    return models_folder() / folder_name(file.name.removesuffix(".gguf"), sha256)


@cache
def _sha256(file: str, size: int, changed: int) -> str:
    """A file's SHA-256, computed once in a process; `size` and `changed` tell a file that was replaced."""
    return sha256_of(file)


def read_note(folder: str | Path) -> dict | None:
    """What a folder was converted from, `{"model": "smollm2", "sha256": …}`; None if it is no complete conversion."""
    folder = Path(folder)
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in note["files"].items())
        return note if whole and isinstance(note["model"], str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_space(name: str, path: str, size: int) -> list[Problem]:
    """Checks that the disk of the converted models has `size` bytes free."""
    root = existing_parent(models_folder())
    free = shutil.disk_usage(root).free
    if free >= size and os.access(root, os.W_OK):
        return []
    lacks = f"and {root} has {free / 1e9:,.1f} GB free" if free < size else f"and {root} cannot be written"
    return refusal(
        f"{name} {path!r} is converted to safetensors, for which {size / 1e9:,.1f} GB are needed, {lacks}; set HF_HOME "
        "to a folder on another disk",
        *([name.removeprefix("--")] if name.startswith("--") else []),
    )


@contextlib.contextmanager
def conversion(folder: Path) -> Iterator[Path | None]:
    """Lets one process at a time make a converted folder; others wait, and then find it.

    Yields:
        a temporary folder on the same disk to write to, which takes the name `folder` if the block succeeds; None if
        another process has made it meanwhile.
    """
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    # in the temporary folder of this machine, as not every network disk has locks; a killed process releases it
    with FileLock(Path(tempfile.gettempdir()) / f"llm_dojo-{os.getuid()}-{folder.name}.lock"):
        if read_note(folder) is not None:
            yield None
            return
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
            yield Path(made)
            _put(Path(made), folder)
            os.mkdir(made)  # for its own removal


def _put(made: Path, folder: Path) -> None:
    """Renames a finished folder; a damaged one of that name is replaced, one that another machine made is kept."""
    if folder.exists() and read_note(folder) is None:
        shutil.rmtree(folder)
    os.chmod(made, 0o777 & ~_umask())
    try:
        os.rename(made, folder)
    except OSError:
        if read_note(folder) is None:
            raise
        shutil.rmtree(made)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def convert_gguf(path: str | Path, given: str, folder: Path, extra: dict[str, Path] | None = None) -> None:
    """Converts a GGUF file, in a process of its own: ranks, ZeRO-3 and FSDP change how transformers loads weights.

    Args:
        path: the file.
        given: by what name it was given, for the note.
        folder: created, and filled.
        extra: name → a file to copy beside the model.

    Raises:
        UserError: it cannot be converted.
    """
    file = read_gguf(path)
    size = file.weights * DTYPES[file.dtype]
    logger.info(
        "{} is converted to safetensors once: {:,} weights in {}, {:,.0f} MB, kept in {}",
        given, file.weights, file.dtype, size / 1e6, models_folder(),
    )  # fmt: skip
    if rule := other_split(file):
        logger.warning(
            "{}: transformers has no rule for its way of splitting text, {!r}, and takes GPT-2's; tokens of numbers "
            "and punctuation may differ from those it was trained on", given, rule,
        )  # fmt: skip
    if not file.chat_template:
        logger.info("{} has no chat template inside; give a registered one as --template_name", given)
    _run_conversion(path, given, folder, size)
    for name, source in (extra or {}).items():
        shutil.copyfile(source, folder / name)
    note = {"model": given, "file": file.path.name, "sha256": sha256_of(str(file.path)), "dtype": file.dtype}
    write_json(folder / NOTE, note | {"weights": file.weights, "files": files_in(folder)})


def _run_conversion(path: str | Path, given: str, folder: Path, size: int) -> None:
    # variables of a launcher would make it one rank of several
    launcher = (
        "ACCELERATE_",
        "FSDP_",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "CROSS_",
        "MASTER_",
        "TORCHELASTIC_",
        "DEEPSPEED",
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    with tempfile.TemporaryDirectory() as temporary:
        problems = Path(temporary) / "problems.json"
        command = [sys.executable, "-m", "utils.model.gguf", str(Path(path).expanduser().resolve()), str(folder)]
        env |= {ERROR_FILE: str(problems), "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
        # stdout may be a command's answers; the messages of an error come back in the file
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        found = read_problems(problems)
    if found:
        raise UserError(*(f"{given}: {problem}" for problem in found.problems))
    if done.returncode:
        reason = f"killed by signal {-done.returncode}; " if done.returncode < 0 else ""
        lines = done.stderr.strip().splitlines() or [""]
        raise UserError(
            f"{given} cannot be converted to safetensors: {reason}{lines[-1]} (its {size / 1e9:,.1f} GB must fit into "
            "memory)"
        )


def save_converted(path: Path, folder: Path) -> None:
    """Reads a GGUF file with transformers and saves model, tokenizer and chat template into a folder.

    Raises:
        UserError: transformers cannot read it, or has other weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = read_gguf(path)
    with linked(path) as source:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
            split_digits(tokenizer, file)
            tokenizer.save_pretrained(folder)
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file="model.gguf",
                config=gguf_config(source, file),
                dtype=getattr(torch, file.dtype),
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        except Exception as error:  # transformers' readers raise their own
            raise UserError(load_failure("model", "the GGUF file", str(path), error)) from error
    if lacking := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]})):
        raise UserError(f"its weights are not those of {type(model).__name__}, such as {lacking[0]}")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


if __name__ == "__main__":
    run_command(lambda: save_converted(Path(sys.argv[1]), Path(sys.argv[2])))
