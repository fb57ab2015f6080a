"""How much tuning teaches the embedded model: rows answered word for word, before and after, by kind and seed.

    python -m benchmarks.tiny_model --seeds 42 1 2      # writes benchmarks/tiny_model.json

The table in data/README.md has these figures.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from data.build.sft_rows import build_rows
from utils.template import get_template

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "tiny_model"


def answer_rows(folder: Path, rows: list[dict]) -> list[str]:
    """Asks each row's instruction, decoding greedily in batches, in plain transformers and PEFT.

    Args:
        folder: the base, or a run with an adapter on it.
        rows: with an `instruction` each.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    if folder != BASE:
        model = PeftModel.from_pretrained(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left")
    template = get_template("qwen", tokenizer)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        prompts = [template.render([{"role": "user", "content": row["instruction"]}], True) for row in part]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=48, do_sample=False, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id
            )
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def count_right(folder: Path, rows: list[dict]) -> dict[str, str]:
    """kind → "right/total", and the same for all."""
    right, total = Counter(), Counter()
    for row, answer in zip(rows, answer_rows(folder, rows), strict=True):
        for kind in ("all", row["kind"]):
            total[kind] += 1
            right[kind] += answer == row["output"]
    return {kind: f"{right[kind]}/{total[kind]}" for kind in total}


def train(folder: Path, seed: int) -> float:
    """Runs the default recipe as a user does; returns its seconds, imports and saving included."""
    started = time.perf_counter()
    command = [sys.executable, "main_train.py", "--output_dir", str(folder), "--seed", str(seed)]
    subprocess.run([*command, "--cache_dir", str(folder) + "-cache"], cwd=ROOT, check=True, capture_output=True)
    return round(time.perf_counter() - started, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    args = parser.parse_args()
    rows, held_back = build_rows()
    results = {
        "cpu_cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
        "base": count_right(BASE, rows + held_back),
        "runs": [],
    }
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            seconds = train(Path(folder) / "run", seed)
            run = {"seed": seed, "seconds": seconds, "training_rows": count_right(Path(folder) / "run", rows)}
            run["held_back_rows"] = count_right(Path(folder) / "run", held_back)
        print(json.dumps(run))
        results["runs"].append(run)
    (ROOT / "benchmarks" / "tiny_model.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
