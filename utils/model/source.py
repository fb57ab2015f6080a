"""Where a model comes from if not from a folder or a hub: a GGUF file, or a short name. Both become a folder once."""

from pathlib import Path

from utils.model.gguf import NOTE, check_space, conversion, convert_gguf, gguf_folder, models_folder, read_note
from utils.model.gguf_file import check_gguf, check_package, is_gguf, read_gguf
from utils.model.named_models import MODELS, check_named, make_named, named_folder
from utils.runtime.errors import Problem
from utils.storage.files import project_path, sha256_of, write_json
from utils.storage.run_folder import read_run_note
from utils.storage.weights import DTYPES


def is_source(path: str) -> bool:
    """Whether a path is a GGUF file or a short name; a file or folder of the same name is taken first."""
    return is_gguf(path) or (path in MODELS and not Path(path).exists())


def made_folder(path: str) -> str:
    """The folder that a GGUF file or a short name was converted to; the path itself if it was not, or is neither."""
    if not is_source(path):
        return path
    folder = named_folder(path) if path in MODELS else gguf_folder(path)
    return str(folder) if read_note(folder) is not None else path


def check_source(flag: str, path: str) -> list[Problem]:
    """Checks what can be checked of a GGUF file or a short name before it is converted; returns the problems."""
    if missing := check_package(flag, path):
        return missing
    if path in MODELS:
        return check_named(flag, path)
    if found := check_gguf(flag, path):
        return found
    file = read_gguf(path)
    return check_space(flag, path, file.weights * DTYPES[file.dtype] + 10_000_000)


def make_folder(path: str) -> str:
    """Converts a GGUF file or a short name's model to a folder, unless it is there; other paths are returned as is.

    Raises:
        UserError: it cannot be downloaded or converted.
    """
    if not is_source(path):
        return path
    if path in MODELS:
        return str(make_named(path))
    folder, given = gguf_folder(path), str(Path(path).expanduser().resolve())
    with conversion(folder) as made:
        if made is not None:
            convert_gguf(path, given, made)
    note = read_note(folder)
    if note and note["model"] != given and not Path(note["model"]).is_file():  # the file was moved
        write_json(folder / NOTE, note | {"model": given})
    return str(folder)


def given_model(path: str) -> str:
    """What a converted folder was made from, the name to record: `smollm2`, or a GGUF file's path; else the path."""
    note = read_note(path) if _is_converted_path(path) else None
    return note["model"] if note else path


def is_converted(path: str) -> bool:
    """Whether a folder is one of the converted models, which no command may change."""
    return _is_converted_path(path) and read_note(path) is not None


def has_chat_template(path: str) -> bool:
    """Whether a model of a GGUF file or a short name, converted or not, brings a chat template."""
    if is_converted(path):
        return (Path(path) / "chat_template.jinja").is_file()
    if not is_source(path):
        return False
    try:
        return path in MODELS or bool(read_gguf(path).chat_template)
    except (ValueError, OSError):
        return False


def find_base(recorded: str, adapter: str | Path) -> str:
    """Finds the base that an adapter names, also on another machine and after the folder was removed from the cache.

    An adapter_config.json names the converted folder, which other programs can load. Where there is no such folder, its
    name says what to convert: a short name, or a GGUF file by its SHA-256, whose path is in the run's record.

    Args:
        recorded: `base_model_name_or_path` of adapter_config.json.
        adapter: its folder.

    Returns:
        a folder, a short name, a GGUF file, or the path itself.
    """
    base = project_path(recorded)
    if Path(base).is_dir() or not _is_converted_path(base):
        return made_folder(base)
    name = Path(base).name
    here = models_folder() / name
    if read_note(here) is not None:
        return str(here)
    if short := next((short for short in MODELS if named_folder(short).name == name), None):
        return short
    noted = str(read_run_note(adapter, "base").get("path") or "")
    return noted if is_gguf(noted) and name.endswith(sha256_of(noted)[:16]) else base


def _is_converted_path(path: str) -> bool:
    """Whether a path has the form of a converted folder's: `…/llm_dojo/models/<name>-<sha256>`."""
    return Path(path).parts[-3:-1] == models_folder().parts[-2:]
