"""Converts a GGUF file into a folder as transformers saves it: safetensors, tokenizer, chat template.

The folder is kept beside the Hub's cache, in `$HF_HOME/llm_dojo/models`, named by the file's SHA-256. Everything that
takes a model's folder then works with it as with any other.
"""

import contextlib
import glob
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from loguru import logger

from utils.model.gguf_file import gguf_config, linked, other_split, read_gguf, split_digits
from utils.runtime.command import run_command
from utils.runtime.errors import ERROR_FILE, Problem, UserError, load_failure, read_problems, refusal
from utils.storage.files import ROOT, existing_parent, sha256_of, write_json, write_refusal
from utils.storage.run_folder import files_in
from utils.storage.weights import DTYPES

NOTE = "source.json"  # in a converted folder, written last: what it was made from, and its files
_DIGITS = 16  # of the SHA-256 in the folder's name
# the beginnings of a launcher's variables, which would make the converting process one rank of several
_LAUNCHER = (
    "ACCELERATE_", "FSDP_", "RANK", "WORLD_SIZE", "LOCAL_", "CROSS_", "MASTER_", "TORCHELASTIC_", "DEEPSPEED",
)  # fmt: skip


def models_folder() -> Path:
    """The folder of all converted models."""
    from huggingface_hub import constants

    # absolute, as the converting process runs in another folder
    return Path(constants.HF_HOME).expanduser().resolve() / "llm_dojo" / "models"


def folder_name(stem: str, sha256: str) -> str:
    """`folder_name("smollm2", "b179…")` → `"smollm2-b179c9523d0e6a0f"`; a stem is cut to 100 bytes."""
    stem = stem.encode(errors="ignore")[:100].decode(errors="ignore")  # names of temporary folders are longer
    return f"{stem}-{sha256[:_DIGITS]}"


def gguf_folder(path: str | Path) -> Path:
    """The folder that a GGUF file is converted to, whether it exists or not.

    Raises:
        UserError: the file cannot be read.
    """
    file = Path(path).expanduser().resolve()
    try:
        return models_folder() / folder_name(file.name.removesuffix(".gguf"), _sha256_of(file))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def _sha256_of(file: Path) -> str:
    """A GGUF file's SHA-256, computed once in a process as long as the file is not changed."""
    stat = file.stat()
    return _sha256(str(file.resolve()), stat.st_size, stat.st_mtime_ns)


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
        return note if whole and _has_model(note["files"]) and isinstance(note["model"], str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def change_note(folder: Path, **values: str) -> None:
    """Changes values in the note of a converted folder; nothing happens where the folder cannot be written."""
    with contextlib.suppress(OSError), _lock(folder):
        if note := read_note(folder):
            write_json(folder / NOTE, note | values)


def _has_model(files: Iterable[str]) -> bool:
    """Whether there are a configuration and weights among the names of files."""
    return "config.json" in files and any(name.endswith(".safetensors") for name in files)


def check_space(name: str, path: str, size: int) -> list[Problem]:
    """Checks that the folder of the converted models can be written, and that its disk has `size` bytes free."""
    root = existing_parent(models_folder())
    free, reason = shutil.disk_usage(root).free, write_refusal(models_folder())
    if free >= size and reason is None:
        return []
    lacks = f"{root} has {free / 1e9:,.1f} GB free" if reason is None else f"nothing can be written there: {reason}"
    return refusal(
        f"{name} {path!r} is converted to safetensors in {str(models_folder())!r}, for which {size / 1e9:,.1f} GB are "
        f"needed, and {lacks}; set HF_HOME to another folder",
        *([name.removeprefix("--")] if name.startswith("--") else []),
    )


@contextlib.contextmanager
def conversion(folder: Path) -> Iterator[Path | None]:
    """Lets one process at a time make a converted folder; others wait, and then find it.

    Yields:
        a temporary folder on the same disk to write to, which takes the name `folder` if the block succeeds; None if
        another process has made it meanwhile.

    Raises:
        UserError: a folder or a file cannot be written.
    """
    # with machine and user: others, which do not share the lock, may be writing to the same disk
    prefix = f".{folder.name}-{platform.node()[:60]}-{os.getuid()}-"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if read_note(folder) is not None:
                yield None
                return
            for left in folder.parent.glob(f"{glob.escape(prefix)}*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as made:
                yield Path(made)
                _put(Path(made), folder)
                os.mkdir(made)  # for its own removal
    except OSError as error:
        raise UserError(f"the folder {str(folder)!r} cannot be made: {error}; see HF_HOME") from error


def _lock(folder: Path):
    """The lock of a converted folder, held by one process of this machine at a time."""
    from filelock import FileLock

    # in the temporary folder of this machine, as not every network disk has locks; a killed process releases it
    return FileLock(Path(tempfile.gettempdir()) / f"llm_dojo-{os.getuid()}-{folder.name}.lock")


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
    if not _has_model(files_in(folder)):
        raise UserError(f"{given} cannot be converted to safetensors: no model was written into {folder}")
    for name, source in (extra or {}).items():
        shutil.copyfile(source, folder / name)
    note = {"model": given, "file": file.path.name, "sha256": _sha256_of(file.path), "dtype": file.dtype}
    write_json(folder / NOTE, note | {"weights": file.weights, "files": files_in(folder)})


def _run_conversion(path: str | Path, given: str, folder: Path, size: int) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    with tempfile.TemporaryDirectory() as temporary:
        problems = Path(temporary) / "problems.json"
        command = [sys.executable, "-m", "utils.model.gguf", str(Path(path).expanduser().resolve()), str(folder)]
        env |= {ERROR_FILE: str(problems), "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
        stdin, held = os.pipe()  # the system closes `held` if this process is killed; see `_exit_with_parent`
        try:
            # stdout may be a command's answers; the messages of an error come back in the file
            done = subprocess.run(
                command, cwd=ROOT, env=env, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        finally:
            os.close(stdin)
            os.close(held)
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


def _exit_with_parent() -> None:
    """Ends this process once its parent has ended, which closes the pipe that is its standard input."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    run_command(lambda: save_converted(Path(sys.argv[1]), Path(sys.argv[2])))
