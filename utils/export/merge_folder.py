"""The output folder of a merge: checked before, written completely or not at all, and replaced if a merge wrote it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.infer.load import Parts
from utils.runtime.errors import UserError, is_disk_error
from utils.storage.files import existing_parent, write_refusal
from utils.storage.run_files import FULL_WEIGHTS, WRITTEN
from utils.storage.run_folder import MERGED, RECORD_FILE, files_in
from utils.storage.weights import weights_size

_MERGING = ".merging"  # a file in the folder while it is being written


def foreign_to_merge(folder: Path) -> list[str]:
    """The files in a folder that no merge wrote, or that were changed since, by the list of files in its record.

    The record of an older merge has no such list; then all names that merges write count as its own.
    """
    if not folder.is_dir():
        return []
    recorded, found = read_merged(folder).get("files"), files_in(folder)
    links = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink()}
    if not isinstance(recorded, dict):
        own = {name for name in found if name in (*WRITTEN, "Modelfile", RECORD_FILE) or FULL_WEIGHTS.fullmatch(name)}
    else:
        own = {name for name, size in found.items() if recorded.get(name) == size}
    return sorted((found.keys() - own - {MERGED}) | links)


def read_merged(folder: Path) -> dict:
    """The record of a merge; empty if there is none that can be read."""
    try:
        found = json.loads((folder / MERGED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def atomic_folder(folder: Path, flag: str) -> Iterator[Path]:
    """Yields a temporary folder to write into, which replaces `folder` at the end.

    After a failure or an interruption the temporary folder is removed, and an earlier `folder` is kept.

    Args:
        folder: the final folder.
        flag: the flag that names it, with its value, for messages.

    Raises:
        UserError: the disk is full or not writable.
    """
    # in the same directory, so that rename() is atomic; with fixed names, so that a retry removes a killed run's
    part, old = (folder.with_name(f".{folder.name}.{ending}") for ending in ("part", "old"))
    try:
        _put_back(old, folder)
        _remove_own(part, _MERGING)
        part.mkdir(
            parents=True, exist_ok=part.is_dir() and not any(part.iterdir())
        )  # empty if killed right after mkdir
        (part / _MERGING).touch()
        yield part
        if foreign := foreign_to_merge(folder):  # added during the merge
            raise UserError(f"{flag} holds {foreign[0]!r}, which no merge wrote; move it, or give another folder")
        (part / _MERGING).unlink()
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise UserError(
            f"{flag} cannot be written: {error}. Nothing of it is kept; free some space, or give another folder"
        ) from error
    finally:
        _remove_own(part, _MERGING)
        _put_back(old, folder)


def _put_back(old: Path, folder: Path) -> None:
    """Restores the earlier folder, unless a complete one has replaced it."""
    if (old / MERGED).is_file() and not folder.exists():
        old.rename(folder)
    _remove_own(old, MERGED)


def _remove_own(folder: Path, mark: str) -> None:
    """Removes a temporary folder of a merge, if the file `mark` shows that a merge made it."""
    if (folder / mark).is_file() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)


def check_output_dir(path: str | None, overwrite: bool, parts: Parts, dtype: str | None, sized: bool) -> list[str]:
    """The problems of `--output_dir`, the folder of the merged model.

    Args:
        path: its value.
        overwrite: whether an earlier merge in it may be replaced.
        parts: base and adapters.
        dtype: of the result, as for `load_merged`.
        sized: whether the base's files can be read, and the space for the result be computed.
    """
    if not path:
        return ["--output_dir is missing; give a new folder for the merged model"]
    flag, folder = f"--output_dir {path!r}", Path(path).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        return [f"{flag} is a file; give a folder"]
    for source in map(Path, (parts.base, *parts.adapters)):
        if source.is_dir() and folder in (source.resolve(), *source.resolve().parents):
            return [f"{flag} is or contains {str(source)!r}, which is to be merged; give another folder"]
    if problem := _check_content(flag, folder, overwrite):
        return [problem]
    if reason := write_refusal(folder.parent):
        return [f"{flag} cannot be written: {reason}; give another folder"]
    needed = weights_size(parts.base, dtype) if sized else 0
    free = shutil.disk_usage(existing_parent(folder.parent)).free
    if needed > free:
        return [
            f"{flag} needs about {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free; free some space, "
            "give a folder on another disk, or a smaller --dtype"
        ]
    return []


def _check_content(flag: str, folder: Path, overwrite: bool) -> str | None:
    """Why a folder cannot be replaced: only the files of a merge ever are, and only with `--overwrite true`."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if names and MERGED not in names:
        return f"{flag} holds {names[0]!r}, which no merge wrote; give a new or an empty folder"
    if names and not overwrite:
        return f"{flag} holds a merged model; give another folder, or --overwrite true to replace it"
    if foreign := foreign_to_merge(folder):
        return (
            f"{flag} holds {foreign[0]!r}, which no merge wrote, or which was changed since, and --overwrite true "
            "replaces only what a merge wrote; move it, or give another folder"
        )
    return None
