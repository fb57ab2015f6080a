"""Tells which files of a folder a run wrote; `--overwrite_output_dir` removes only those."""

import re
from pathlib import Path

from utils.storage.run_folder import (
    MERGED,
    RECORD_FILE,
    STATE,
    checkpoints_of,
    is_removable,
    read_record,
    remove_checkpoint,
    remove_files,
)  # fmt: skip

LEDGER_FILE = "row_ledger.parquet"  # the losses of rows, of `--row_ledger true`
# what a run writes beside its weights; a file of this name that lies there already would be lost
WRITTEN = (
    "README.md", "adapter_config.json", "chat_template.jinja", "config.json", "generation_config.json", "loss.png",
    "model.safetensors.index.json", LEDGER_FILE, "special_tokens_map.json", "added_tokens.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "train.log", "trainer_state.json", "training_args.bin", "vocab.json",
    "merges.txt",
)  # fmt: skip
PISSA_START = "_pissa_start"  # what begins so is never pushed
FULL_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")  # names of the files of full weights
_WEIGHTS = re.compile(rf"adapter_model\.safetensors|{FULL_WEIGHTS.pattern}")
# the run's own by what it holds, or written with every step
_ALWAYS = {"README.md", "train.log", STATE, "loss.png", "training_args.bin"}


def written_here(folder: Path) -> dict[str, int]:
    """Returns the files with names that a run writes: name → bytes. They are part of a finished run's record."""
    return {name: (folder / name).stat().st_size for name in _names_in(folder)}


def _names_in(folder: Path) -> list[str]:
    files = [path for path in folder.glob("*") if path.is_file()]
    return sorted(path.name for path in files if path.name in WRITTEN or _WEIGHTS.fullmatch(path.name))


def foreign_files(folder: Path) -> list[str]:
    """Returns files with names that a run writes, which no run wrote or which were changed since.

    Of a run that did not end, and of one whose record is older than the list of its files, every file of such a name
    counts as the run's.
    """
    record = read_record(folder)
    if (folder / MERGED).exists() or not isinstance((record or {}).get("trainer"), dict):
        names = [name for name in _names_in(folder) if name != "README.md"]  # never written over where it is no card
        return [*names, *(path.name for path in checkpoints_of(folder))]
    noted = record.get("files") if isinstance(record.get("files"), dict) else None
    found = []
    for name in _names_in(folder):
        if noted is None or name in _ALWAYS:
            continue
        resized = _WEIGHTS.fullmatch(name) and (folder / name).stat().st_size != noted.get(name)
        if name not in noted or resized:
            found.append(name)
    return found + [path.name for path in checkpoints_of(folder) if not is_removable(path)]


def holds_weights(folder: Path, adapter: bool) -> bool:
    """Whether a folder holds weights under the names a run saves: an adapter's or a full model's."""
    return any(name.startswith("adapter_model") == adapter for name in _names_in(folder) if _WEIGHTS.fullmatch(name))


def clear_run(folder: Path, own_card: bool) -> None:
    """Removes the files of an earlier run and no others; the record of the run that starts now stays.

    Args:
        folder: the run's.
        own_card: whether its README.md is one that a run wrote.
    """
    foreign = foreign_files(folder)
    gone = [RECORD_FILE, STATE, "train.log", "loss.png", LEDGER_FILE, "model.safetensors.index.json"]
    gone += [name for name in _names_in(folder) if _WEIGHTS.fullmatch(name)] + ["README.md"] * own_card
    for name in gone:
        if name not in foreign:
            (folder / name).unlink(missing_ok=True)
    for old in checkpoints_of(folder):
        remove_checkpoint(old)


def remove_pissa_start(folder: Path) -> None:
    """Removes the initial adapter of a PiSSA run."""
    start = folder / PISSA_START
    if start.is_dir() and not start.is_symlink():
        remove_files(start, ["adapter_config.json", "adapter_model.safetensors", "README.md"])
