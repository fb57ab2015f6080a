"""Checkpoints that are whole or not there: each ends with a list of its files, written last. And a run's record.

A process can die at any moment, also between two files of a checkpoint or in the middle of one.
What `complete.json` lists, with sizes, was there before it; a folder without it is a torso.
"""

import json
import os
import shutil
from pathlib import Path

MANIFEST = "complete.json"
FINISHED = "train_args.json"  # written last: a folder that has it holds a finished run
BEGUN = FINISHED + ".part"  # the same of a run that is not finished; finishing renames it
STATE = "trainer_state.json"


def read_record(run: Path) -> dict | None:
    """The record of a finished run, or of one that began; None where there is none that can be read."""
    for name in (FINISHED, BEGUN):
        try:
            record = json.loads((run / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            return record
    return None


def noted_by_run(folder: str | Path, part: str) -> dict:
    """A part of what a run noted of itself, by its folder or that of a checkpoint; empty where it did not."""
    folder = Path(folder)
    found = (read_record(folder.parent if (folder / MANIFEST).is_file() else folder) or {}).get(part)
    return found if isinstance(found, dict) else {}


def checkpoints_of(run: Path) -> list[Path]:
    """A run's checkpoints, whole or not, the newest last."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def newer_than(checkpoint: str, run: Path) -> list[Path]:
    """A run's checkpoints of later steps than `checkpoint`; for a run that goes on from it, those of another branch."""
    found = [folder for folder in checkpoints_of(run) if read_manifest(folder) is not None]
    step = Path(checkpoint).name.removeprefix("checkpoint-")
    return [folder for folder in found if step.isdigit() and int(folder.name.removeprefix("checkpoint-")) > int(step)]


def mark_complete(folder: Path, settings: dict) -> None:
    """Writes the list of a checkpoint's files, in one step that cannot be half done.

    Args:
        folder: the checkpoint, all of whose files are written.
        settings: what a run must have in common with this one to go on from it.
    """
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    sizes.pop(MANIFEST, None)  # of an earlier save of the same step
    text = json.dumps({"settings": settings, "files": sizes}, indent=1, ensure_ascii=False, default=str)
    temporary = folder / (MANIFEST + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)


def read_manifest(folder: Path) -> dict | None:
    """A checkpoint's manifest; None where it was not written to its end."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return manifest if whole and manifest["files"] and isinstance(manifest["settings"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a whole checkpoint holds more than weights: the optimizer's state, torch's, FSDP's or DeepSpeed's."""
    files = [Path(name) for name in (read_manifest(checkpoint) or {"files": {}})["files"]]
    torch_or_fsdp = any(file.parts[0].startswith("optimizer") for file in files)
    return torch_or_fsdp or any("global_step" in file.parts[0] for file in files)


def anew(checkpoint: str, train_mode: str) -> str:
    """The remedy where a checkpoint's weights can be used and its optimizer cannot."""
    flag = "--model_name_or_path" if train_mode == "full" else "--adapter_name_or_path"
    return f"start a new run from its weights: {flag} {checkpoint}, with another --output_dir"


def remove_torsos(run: Path) -> list[str]:
    """Removes checkpoints that were not written to their end; returns their names."""
    torsos = [folder for folder in checkpoints_of(run) if read_manifest(folder) is None]
    for folder in torsos:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in torsos]


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond `limit`; never the newest whole one, nor the best.

    Args:
        run: the run's folder.
        limit: how many to keep; None or 0 for all.
        best: the checkpoint of the best evaluation, which stays.
    """
    if not limit or limit < 1:
        return
    found = checkpoints_of(run)
    whole = [folder for folder in found if read_manifest(folder) is not None]
    kept = {folder.resolve() for folder in whole[-1:]} | ({Path(best).resolve()} if best else set())
    spare = [folder for folder in found if folder.resolve() not in kept]
    for folder in spare[: max(0, len(found) - max(limit, len(kept)))]:
        (folder / MANIFEST).unlink(missing_ok=True)  # first: half removed it is no checkpoint any more
        shutil.rmtree(folder, ignore_errors=True)
