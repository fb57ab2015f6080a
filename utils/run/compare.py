"""Compares runs: reads their folders, and lists the settings and results in which they differ."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from utils.run.plot import series
from utils.runtime.errors import UserError, nearest_path
from utils.runtime.text import format_setting, markdown_table
from utils.storage.run_folder import STATE, checkpoints_of, read_record

_A_RUN = f"a run has train_args.json and {STATE}, or checkpoint-N/{STATE}"
# settings that differ between any two runs and do not change the training
_NOT_SETTINGS = (
    "config", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "local_rank", "card_samples",
    "row_ledger",
    "disable_tqdm",
)  # fmt: skip
_MISSING = "–"
# a path → the entry that identifies its content, as paths may be relative or absolute
_CONTENT = {
    "model_name_or_path": "weights of the base", "adapter_name_or_path": "weights of the adapter",
    "train_data_path": "sha256 of the train data", "eval_data_path": "sha256 of the eval data",
}  # fmt: skip


@dataclass
class Run:
    """A run to compare.

    Attributes:
        folder: of the run.
        history: the trainer's log.
        step: its last step; `planned` is how many were planned.
        record: its train_args.json; empty if it stopped before writing one.
    """

    folder: Path
    history: list[dict]
    step: int
    planned: int
    record: dict = field(default_factory=dict)


def read_run(path: str) -> Run:
    """Reads a run's folder.

    Raises:
        UserError: it is not the folder of a run, or the run logged nothing.
    """
    folder = Path(path)
    if not folder.is_dir():
        siblings = folder.parent.glob("*") if folder.parent.is_dir() else []
        raise UserError(f"{path!r} is not a folder.{nearest_path(path, siblings)} Give runs' folders: {_A_RUN}")
    states = [state for place in (folder, *checkpoints_of(folder)) if (state := _read_state(place / STATE))]
    if not states:
        below = sorted(str(found.parent) for found in folder.glob(f"*/{STATE}"))
        hint = f" Runs in it: {', '.join(below[:5])}" if below else ""
        raise UserError(f"{path!r} holds no run: {_A_RUN}.{hint}")
    # of equal steps the first, the run's own, whose history has the training time
    state = max(states, key=lambda state: state["global_step"])
    history = [log for log in state["log_history"] if isinstance(log, dict) and isinstance(log.get("step"), int)]
    if not history:
        raise UserError(f"{path!r} logged nothing: it stopped before its first --logging_steps; leave it out")
    return Run(folder, history, state["global_step"], _part(state, "max_steps", int), read_record(folder) or {})


def _read_state(file: Path) -> dict | None:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return state if isinstance(state["log_history"], list) and isinstance(state["global_step"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def label_runs(folders: list[Path]) -> list[str]:
    """The shortest endings of the paths that distinguish the folders: `[a/run, b/run]` → `["a/run", "b/run"]`"""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts))
    length = next(n for n in range(1, longest + 1) if len({part[-n:] for part in parts}) == len(parts) or n == longest)
    return [str(Path(*part[-length:])) for part in parts]


def results(run: Run) -> dict[str, str]:
    """The results of a run, formatted."""
    names = ("loss", "eval_rewards/accuracies", "train_runtime")
    losses, pairs, times = (series(run.history, name)[1] for name in names)
    losses_at = zip(*series(run.history, "eval_loss"), strict=True)
    evaluated = {step: loss for step, loss in losses_at if math.isfinite(loss)}
    best = min(evaluated, key=evaluated.__getitem__, default=None)
    resumed = " (since it was resumed)" if _part(run.record, "trainer").get("resume_from_checkpoint") else ""
    stopped = "" if run.step >= run.planned else f" of {run.planned:,} (stopped)"
    return {
        "steps": f"{run.step:,}{stopped}",
        "last training loss": f"{losses[-1]:.4f}" if losses else _MISSING,
        "last evaluation loss": f"{evaluated[max(evaluated)]:.4f}" if evaluated else _MISSING,
        "best evaluation loss": f"{evaluated[best]:.4f} (step {best:,})" if evaluated else _MISSING,
        "evaluation pairs right, last": f"{100 * pairs[-1]:.1f} %" if pairs else _MISSING,
        "training time": f"{times[-1]:,.1f} s{resumed}" if times else _MISSING,
    }


def _part(record, name: str, kind: type = dict):
    """A part of a record; an empty value if it is missing or damaged."""
    found = record.get(name) if isinstance(record, dict) else None
    return found if isinstance(found, kind) else kind()


def settings(run: Run) -> dict:
    """A run's settings with its base, data and versions; empty if it has no record."""
    record = run.record
    if not record:
        return {}
    found = _part(record, "trainer") | _part(record, "common")
    found = {name: value for name, value in found.items() if name not in _NOT_SETTINGS}
    origin = {f"weights of the {part}": _part(record, part).get("fingerprint") for part in ("base", "adapter")}
    for part, rows in _part(record, "data").items():
        files = _part(rows, "files", list)
        hashes = [(_part(file, "sha256", str) or _part(file, "fingerprint", str))[:12] for file in files]
        origin[f"sha256 of the {part} data"] = ", ".join(filter(None, hashes))
    origin |= {f"{name} version": version for name, version in _part(record, "versions").items()}
    origin["processes"] = _part(record, "start").get("processes")
    return found | {name: value for name, value in origin.items() if value}


def differing(runs: list[Run]) -> dict[str, list[str]]:
    """The settings in which runs differ, formatted; a dash if a run has no such setting or no record."""
    found = [settings(run) for run in runs]
    recorded = [values for values in found if values]
    rows = {}
    for name in dict.fromkeys(name for values in recorded for name in values):
        given = [values.get(name) for values in recorded]  # a missing setting equals None
        if any(value != given[0] for value in given) and not _is_same_path(name, recorded):
            texts = iter(_shorten([values[name] for values in found if name in values]))
            rows[name] = [next(texts) if name in values else _MISSING for values in found]
    return rows


def _is_same_path(name: str, recorded: list[dict]) -> bool:
    """Whether paths have a common ending and the same content: `data/base` and `/home/x/data/base`."""
    contents = {values.get(_CONTENT.get(name)) for values in recorded}
    paths = [values.get(name) for values in recorded]
    if len(contents) > 1 or None in contents or not all(isinstance(path, str) for path in paths):
        return False
    parts = [[part for part in Path(path).parts if part != ".."] for path in paths]
    longest = max(parts, key=len)
    return all(part and part == longest[-len(part) :] for part in parts)


def _shorten(values: list) -> list[str]:
    """Formats values; of paths only what follows the folders they share."""
    paths = {value for value in values if isinstance(value, str) and "/" in value}
    alike = len(set(map(os.path.isabs, paths))) == 1  # absolute and relative paths have no common folder
    relative = {}
    if len(paths) > 1 and alike and not any("," in path for path in paths):
        shared = os.path.commonpath(paths) or "."
        relative = {path: os.path.relpath(path, shared) for path in paths}
    return [
        relative[value] if isinstance(value, str) and value in relative else format_setting(value) for value in values
    ]


def table(labels: list[str], runs: list[Run]) -> str:
    """Results and differing settings in Markdown, a column for each run."""
    found = [results(run) for run in runs]
    rows = {name: [result[name] for result in found] for name in found[0]}
    rows = {name: row for name, row in rows.items() if set(row) != {_MISSING}}
    rows |= differing(runs)
    return markdown_table(["", *labels], [[name, *row] for name, row in rows.items()])
