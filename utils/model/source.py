"""Where a model comes from if not from a folder or a hub: a GGUF file, or a short name. Both become a folder once."""

from pathlib import Path

from utils.model.gguf import change_note, check_space, conversion, convert_gguf, gguf_folder, models_folder, read_note
from utils.model.gguf_file import check_gguf, check_package, is_gguf, read_gguf
from utils.model.named_models import MODELS, check_named, make_named, named_folder
from utils.runtime.errors import Problem
from utils.storage.files import project_path, sha256_of
from utils.storage.run_folder import read_run_note
from utils.storage.weights import DTYPES

_GIVEN: dict[str, str] = {}  # a converted folder → the name by which this process was given it


def is_source(path: str) -> bool:
    """Whether a path is a GGUF file or a short name; a file or folder of the same name is taken first."""
    return is_gguf(path) or _is_short_name(path)


def _is_short_name(path: str) -> bool:
    return path in MODELS and not Path(path).exists()


def made_folder(path: str) -> str:
    """The folder that a GGUF file or a short name was converted to; the path itself if it was not, or is neither."""
    if not is_source(path):
        return path
    folder = named_folder(path) if _is_short_name(path) else gguf_folder(path)
    if read_note(folder) is None:
        return path
    _note_given(folder, path)
    return str(folder)


def check_source(flag: str, path: str) -> list[Problem]:
    """Checks what can be checked of a GGUF file or a short name before it is converted; returns the problems."""
    if missing := check_package(flag, path):
        return missing
    if _is_short_name(path):
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
    if _is_short_name(path):
        folder = make_named(path)
    else:
        folder = gguf_folder(path)
        with conversion(folder) as made:
            if made is not None:
                convert_gguf(path, _given(path), made)
    _note_given(folder, path)
    return str(folder)


def _given(path: str) -> str:
    """The name to record of a GGUF file or a short name."""
    return path if _is_short_name(path) else str(Path(path).expanduser().resolve())


def _note_given(folder: Path, path: str) -> None:
    """Remembers for `given_model` by which path a folder was given; replaces one in its note that is no longer there.

    The file may have been moved or copied after it was converted.
    """
    given = _GIVEN[str(folder)] = _given(path)
    note = read_note(folder)
    if note and note["model"] != given and not _can_be_given(note["model"]):
        change_note(folder, model=given)


def given_model(path: str) -> str:
    """What a converted folder was made from, the name to record: `smollm2`, or a GGUF file's path; else the path.

    Of several paths to the file it is the one given to this process. The folder itself if its file is no longer there.
    """
    note = read_note(path) if _is_converted_path(path) else None
    if note is None:
        return path
    given = _GIVEN.get(path, note["model"])
    return given if _can_be_given(given) else path


def _can_be_given(recorded: str) -> bool:
    """Whether a recorded name can be given again: a short name, or the path of a GGUF file that is still there."""
    return _is_short_name(recorded) or (Path(recorded).is_absolute() and is_gguf(recorded))


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
        return _is_short_name(path) or bool(read_gguf(path).chat_template)
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
