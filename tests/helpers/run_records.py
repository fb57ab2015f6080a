"""Folders of runs as far as they are compared, and the cells of a printed table."""

import json
from pathlib import Path


def write_run(
    folder, learning_rate=1e-3, steps=4, planned=4, loss=2.0, state="trainer_state.json", data="/data/a/rows.jsonl"
):
    """A run's folder, as far as it is compared."""
    history = [{"step": s, "loss": loss / s} for s in range(1, steps + 1)]
    history += [{"step": s, "eval_loss": loss / s + (s == steps)} for s in range(1, steps + 1)]
    if state == "trainer_state.json":
        history.append({"step": steps, "train_runtime": 12.5})
        record = {
            "common": {"train_data_path": data, "lora_rank": 16, "output_dir": str(folder)},
            "trainer": {"learning_rate": learning_rate, "seed": 42, "output_dir": str(folder)},
            "versions": {"torch": "2"},
            "base": {"path": "b", "fingerprint": "f"},
            "data": {"train": {"files": [{"file": data, "sha256": "0" * 64}]}},
        }
        folder.mkdir(parents=True)
        (folder / "train_args.json").write_text(json.dumps(record))
    (folder / state).parent.mkdir(parents=True, exist_ok=True)
    (folder / state).write_text(json.dumps({"log_history": history, "global_step": steps, "max_steps": planned}))
    return str(folder)


def cells(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines}


def change(folder, name="train_args.json", **parts):
    """Changes a file of a run; a dictionary is added to the one that is there."""
    file = Path(folder) / name
    record = json.loads(file.read_text())
    for part, value in parts.items():
        record[part] = record[part] | value if isinstance(value, dict) and part in record else value
    file.write_text(json.dumps(record))
    return folder
