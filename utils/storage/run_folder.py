"""The folder of a run: its record, and checkpoints that are complete or recognised as incomplete.

A process can die at any moment, also between two files of a checkpoint or in the middle of one.
`complete.json` is written last and lists all files with their sizes. While a checkpoint is written it has
`incomplete.json` instead, which names the files that were there before. Only files that a run wrote are ever removed.
"""

import contextlib
import json
import re
from pathlib import Path

from utils.storage.files import write_json

MANIFEST = "complete.json"
INCOMPLETE = "incomplete.json"
_MARKERS = {name + ending for name in (MANIFEST, INCOMPLETE) for ending in ("", ".part")}
MERGED = "merged.json"  # written last: a folder that has it holds a merged model
RECORD_FILE = "train_args.json"  # written last: a folder that has it holds a finished run
RECORD_IN_PROGRESS = RECORD_FILE + ".part"  # the same of a run that is not finished; finishing renames it
STATE = "trainer_state.json"


def read_record(run: Path) -> dict | None:
    """Reads the record of a run, finished or in progress; None if there is none or it cannot be read."""
    for name in (RECORD_FILE, RECORD_IN_PROGRESS):
        try:
            record = json.loads((run / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            return record
    return None


def read_run_note(folder: str | Path, part: str) -> dict:
    """Reads one part of a run's record, by the run's folder or a checkpoint's; empty if it is missing."""
    folder = Path(folder)
    found = (read_record(folder.parent if (folder / MANIFEST).is_file() else folder) or {}).get(part)
    return found if isinstance(found, dict) else {}


def checkpoints_of(run: Path) -> list[Path]:
    """Returns a run's checkpoints, complete or not, the newest last."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoints_after(checkpoint: str, run: Path) -> list[Path]:
    """Returns the complete checkpoints of later steps than `checkpoint`, from which a resumed run would diverge."""
    found = [folder for folder in checkpoints_of(run) if not is_incomplete(folder)]
    step = Path(checkpoint).name.removeprefix("checkpoint-")
    return [folder for folder in found if step.isdigit() and int(folder.name.removeprefix("checkpoint-")) > int(step)]


def files_in(folder: Path) -> dict[str, int]:
    """Returns the files of a folder and its subfolders: relative path → bytes."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def mark_incomplete(folder: Path) -> None:
    """Marks a checkpoint as being written, and records the files in its folder that are not part of it."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {*(_read(folder / MANIFEST).get("files") or ()), *_MARKERS}
    begun = _read(folder / INCOMPLETE).get("foreign")
    foreign = sorted(files_in(folder).keys() - own) if begun is None else begun
    write_json(folder / INCOMPLETE, {"foreign": foreign})
    (folder / MANIFEST).unlink(missing_ok=True)  # no checkpoint until it is written again


def mark_complete(folder: Path, settings: dict) -> None:
    """Marks a checkpoint as complete by writing the list of its files atomically.

    Args:
        folder: the checkpoint, all of whose files are written.
        settings: what a run must have in common with this one to go on from it.
    """
    foreign = {*(_read(folder / INCOMPLETE).get("foreign") or ()), *_MARKERS}
    sizes = {name: size for name, size in files_in(folder).items() if name not in foreign}
    write_json(folder / MANIFEST, {"settings": settings, "files": sizes})
    (folder / INCOMPLETE).unlink(missing_ok=True)


def _read(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_manifest(folder: Path) -> dict | None:
    """Reads a checkpoint's manifest; None if the checkpoint is incomplete or its files changed in size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        unchanged = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return manifest if unchanged and manifest["files"] and isinstance(manifest["settings"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a complete checkpoint has the state of an optimizer: torch's, FSDP's or DeepSpeed's."""
    files = [Path(name) for name in (read_manifest(checkpoint) or {"files": {}})["files"]]
    torch_or_fsdp = any(file.parts[0].startswith("optimizer") for file in files)
    return torch_or_fsdp or any("global_step" in file.parts[0] for file in files)


def new_run_remedy(checkpoint: str, adapter: bool) -> str:
    """Returns the remedy for a checkpoint whose weights can be used and whose optimizer cannot."""
    flag = "--adapter_name_or_path" if adapter else "--model_name_or_path"
    return f"start a new run from its weights: {flag} {checkpoint}, with another --output_dir"


def is_incomplete(folder: Path) -> bool:
    """Whether a run started to write this checkpoint and did not finish, even before its first file."""
    if folder.is_symlink() or (folder / MANIFEST).exists():
        return False
    return isinstance(_read(folder / INCOMPLETE).get("foreign"), list) or files_in(folder).keys() <= _MARKERS


def is_removable(folder: Path) -> bool:
    """Whether a checkpoint is incomplete, or complete and unchanged, so that it may be removed.

    A changed one was made into something else by its owner, and the target of a symbolic link may be shared.
    """
    return is_incomplete(folder) or (read_manifest(folder) is not None and not folder.is_symlink())


def is_truncated(folder: Path) -> bool:
    """Whether a complete checkpoint has all its files, some of them truncated, as after a power failure."""
    try:
        files = _read(folder / MANIFEST).get("files") or {}
        missing = [size - (folder / name).stat().st_size for name, size in files.items()]
        return any(missing) and min(missing) >= 0
    except (OSError, TypeError, AttributeError):
        return False


def remove_checkpoint(folder: Path) -> None:
    """Removes the files that a run wrote to a checkpoint, and the folder if it is empty then.

    Raises:
        OSError: something cannot be removed.
    """
    if not is_removable(folder):
        return
    names = {*(_read(folder / MANIFEST).get("files") or files_in(folder))}
    if not is_incomplete(folder):
        with contextlib.suppress(OSError):  # a full disk has no room for the note
            mark_incomplete(folder)  # one that is removed only in part is incomplete
    names -= {*(_read(folder / INCOMPLETE).get("foreign") or ()), *_MARKERS}
    remove_files(folder, [MANIFEST, *sorted(names), *sorted(_MARKERS)])


def remove_files(folder: Path, names: list[str]) -> None:
    """Removes files of a folder in the given order, then empty folders; never a file outside by its real path.

    Args:
        folder: the folder.
        names: paths within it; what is not there is passed over.
    """
    real = folder.resolve()
    for name in names:
        if (folder / name).parent.resolve().is_relative_to(real):
            (folder / name).unlink(missing_ok=True)
    below = sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True)
    for path in [*below, folder]:
        if not any(path.iterdir()):
            path.rmdir()


def remove_incomplete_checkpoints(run: Path) -> list[str]:
    """Removes incomplete checkpoints; returns their names."""
    incomplete = [folder for folder in checkpoints_of(run) if is_incomplete(folder)]
    for folder in incomplete:
        with contextlib.suppress(OSError):
            remove_checkpoint(folder)
    return [folder.name for folder in incomplete]


def rotate_checkpoints(run: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond `limit`; never the newest complete one, the best, or a changed one.

    Args:
        run: the run's folder.
        limit: how many to keep; None or 0 for all.
        best: the checkpoint of the best evaluation, which stays.
    """
    if not limit or limit < 1:
        return
    found = [folder for folder in checkpoints_of(run) if is_removable(folder)]
    complete = [folder for folder in found if not is_incomplete(folder)]
    kept = {folder.resolve() for folder in complete[-1:]} | ({Path(best).resolve()} if best else set())
    spare = [folder for folder in found if folder.resolve() not in kept]
    for folder in spare[: max(0, len(found) - max(limit, len(kept)))]:
        with contextlib.suppress(OSError):
            remove_checkpoint(folder)


def new_folder(path: str) -> str:
    """A name that no folder has: `output/sft-20260101-000000` → the same, or with `_2`, `_3` … after it."""
    found, number = path, 2
    while Path(found).exists():
        found, number = f"{path}_{number}", number + 1
    return found


def is_default_folder(path: str) -> bool:
    """Whether a run's folder was named by its time, so that no other run may have it."""
    return re.fullmatch(r"output/[a-z_]+-\d{8}-\d{6}(_\d+)?", path) is not None
