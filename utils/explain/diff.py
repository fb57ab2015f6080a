"""Compares a run to come with an earlier one: settings, data, base model, versions, machine, processes."""

import json
from pathlib import Path

from utils.config.config_file import read_config
from utils.run.compare import Run, differing
from utils.run.record import run_record
from utils.runtime.errors import UserError

_MACHINE = ("cpu", "cores", "gpus", "python", "system")


def read_earlier(path: str | None) -> dict | None:
    """Reads the record of the run that `--diff` names; None without `--diff`.

    Raises:
        UserError: no run, or one without a record.
    """
    if path is None:
        return None
    record = read_config(path, "diff").record
    if not record:
        raise UserError(f"--diff {path!r} holds flags, not a run; give a run's folder, or its train_args.json")
    return record


def compare(path: str, then: dict, explained) -> dict:
    """Compares a run to come with an earlier one.

    Args:
        path: as given, for the title.
        then: its record.
        explained: from `utils.explain.explain.explain`.

    Returns:
        `{"run": "output/sft", "differs": {"seed": {"then": "42", "now": "7", "from": "--seed 7"}}}`, values as texts.
    """
    record = run_record(explained.args, explained.train_args, explained.data)
    record["start"]["processes"] = explained.plan["processes"]
    now = json.loads(json.dumps(record, default=str))
    pairs = differing([Run(Path(path), [], 0, 0, record) for record in (then, now)])
    machines = [{name: run["hardware"].get(name) for name in _MACHINE} for run in (then, now)]
    pairs |= {f"the machine's {name}": [_text(machine[name]) for machine in machines] for name in _MACHINE
              if machines[0][name] != machines[1][name] and machines[0][name] is not None}  # fmt: skip
    summary = then.get("summary")
    steps = summary.get("steps") if isinstance(summary, dict) else None
    if steps not in (None, explained.plan["steps"]):
        pairs["updates"] = [_text(steps), _text(explained.plan["steps"])]
    return {
        "run": path,
        "differs": {
            name: {"then": one, "now": other, "from": _from(explained, name)} for name, (one, other) in pairs.items()
        },
    }


def _from(explained, name: str) -> str | None:
    source = explained.sources.get(name)
    return source.where if source else None


def _text(value) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
