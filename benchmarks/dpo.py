"""How well the default DPO recipe learns its preferences on the embedded model, and how soon.

python -m benchmarks.dpo --seeds 42 1 2      # writes benchmarks/dpo.json and the guide's table
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.tables import write_table

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "tiny_model"
GUIDE = ROOT / "train_args" / "dpo" / "README.md"


def log_probs(model, tokenizer, file: Path) -> list[tuple[float, float]]:
    """Each pair's log π(chosen) and log π(rejected), by plain transformers, one row at a time."""
    import torch

    from utils.data.pairs import to_pair
    from utils.template import get_template

    template, found = get_template("qwen", tokenizer), []
    for line in file.read_text(encoding="utf-8").splitlines():
        pair, both = to_pair(json.loads(line)), []
        for side in ("chosen", "rejected"):
            row = template.encode(pair["prompt"] + pair[side], tokenizer, train_on="last_turn")
            with torch.inference_mode():
                logits = model(torch.tensor([row["input_ids"]])).logits[0].float()
            log_probs = torch.log_softmax(logits, dim=-1)
            trained = [(i, token) for i, token in enumerate(row["labels"]) if token != -100]
            both.append(sum(log_probs[i - 1, token].item() for i, token in trained))
        found.append((both[0], both[1]))
    return found


def measure(folder: Path, file: Path) -> tuple[float, float]:
    """The share of pairs whose chosen answer is likelier for the base, and has the higher reward after the run."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    reference = log_probs(base, tokenizer, file)
    policy = log_probs(PeftModel.from_pretrained(base, folder), tokenizer, file)
    before = sum(chosen > rejected for chosen, rejected in reference) / len(reference)
    pairs = zip(policy, reference, strict=True)
    after = sum(new[0] - old[0] > new[1] - old[1] for new, old in pairs) / len(reference)
    return round(before, 4), round(after, 4)


def train(folder: Path, mode: str, seed: int) -> float:
    """Runs the default recipe as a user does; returns its seconds, imports and saving included."""
    started = time.perf_counter()
    command = [sys.executable, "main_train.py", "--train_args_path", "train_args/dpo/base.py", "--task_type", mode]
    command += ["--output_dir", str(folder), "--seed", str(seed), "--cache_dir", f"{folder}-cache"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return round(time.perf_counter() - started, 1)


def table(results: dict) -> str:
    """The guide's table."""
    lines = ["| mode | seed | seconds | held-back pairs before | after |", "|---|---|---|---|---|"]
    for run in results["runs"]:
        lines.append(
            f"| `{run['mode']}` | {run['seed']} | {run['seconds']:.0f} | {run['before']:.0%} | {run['after']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    args = parser.parse_args()
    names = ("torch", "transformers", "trl", "peft")
    versions = {name: importlib.metadata.version(name) for name in names}
    results: dict = {"cpu_cores": os.cpu_count(), "versions": versions, "runs": []}
    for mode in ("dpo_multi", "dpo_single"):
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "run"
                seconds = train(folder, mode, seed)
                before, after = measure(folder, ROOT / "data" / f"{mode}_eval_data.jsonl")
            run = {"mode": mode, "seed": seed, "seconds": seconds, "before": before, "after": after}
            print(json.dumps(run))
            results["runs"].append(run)
    (ROOT / "benchmarks" / "dpo.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_table(GUIDE, "benchmarks/dpo.json", table(results))


if __name__ == "__main__":
    main()
