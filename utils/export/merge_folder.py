"""The folder of a merged model: written whole or not at all, and replaced only where a merge wrote all of it."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.runtime.errors import UserError, is_disk_error
from utils.storage.run_files import WRITTEN
from utils.storage.run_folder import MERGED, RECORD_FILE, files_in

_MERGING = ".merging"  # stands in the folder that is being written
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def foreign_to_merge(folder: Path) -> list[str]:
    """What lies in a merged model's folder and is not as a merge wrote it, by its list of files.

    Of a merge older than that list, the names that merges write count as its own.
    """
    if not folder.is_dir():
        return []
    noted, found = read_merged(folder).get("files"), files_in(folder)
    links = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink()}
    if not isinstance(noted, dict):
        own = {name for name in found if name in (*WRITTEN, "Modelfile", RECORD_FILE) or _WEIGHTS.fullmatch(name)}
    else:
        own = {name for name, size in found.items() if noted.get(name) == size}
    return sorted((found.keys() - own - {MERGED}) | links)


def read_merged(folder: Path) -> dict:
    """What a merge noted of itself; empty where it did not, or cannot be read."""
    try:
        found = json.loads((folder / MERGED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
        _remove_own(part, _MERGING)
        part.mkdir(parents=True, exist_ok=part.is_dir() and not any(part.iterdir()))  # killed before its first file
        (part / _MERGING).touch()
        yield part
        if foreign := foreign_to_merge(folder):  # put there while it was merged
            raise UserError(f"{flag} holds {foreign[0]!r}, which no merge wrote; move it away, or give another folder")
        (part / _MERGING).unlink()
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise UserError(
            f"{flag} cannot be written: {error}. Nothing is left of it; make room, or give another folder"
        ) from error
    finally:
        _remove_own(part, _MERGING)
        _put_back(old, folder)


def _put_back(old: Path, folder: Path) -> None:
    """What stood in the folder's place comes back, unless a whole folder stands there."""
    if (old / MERGED).is_file() and not folder.exists():
        old.rename(folder)
    _remove_own(old, MERGED)


def _remove_own(folder: Path, mark: str) -> None:
    """Removes a folder by whose name a merge keeps what is unfinished or replaced, if it holds its mark."""
    if (folder / mark).is_file() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
