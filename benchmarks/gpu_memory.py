"""Peak GPU memory and tokens per second of a 7B model, for each way to train it; no download, random weights.

    python -m benchmarks.gpu_memory                # on a GPU; writes gpu_memory.json and the table in docs/speed.md
    python -m benchmarks.gpu_memory --shape tiny --device cpu --steps 2 --output /tmp/try.json   # the script itself

The model has the shape of Qwen1.5-7B. Each way runs the project's own command in a process of its own: batch 1, 2,048
tokens, gradient checkpointing on, bf16.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.tables import write_table

ROOT = Path(__file__).resolve().parent.parent
# config.json of Qwen/Qwen1.5-7B on the hub
SHAPES = {
    "qwen1.5-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 3584, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
}  # fmt: skip
# way → (flags, the figure to beat in GB and the goal, both for a 7B Qwen)
WAYS = {
    "LoRA": ([], 26, 18),
    "LoRA + ZeRO-2": (["--deepspeed", "zero2"], 26, None),
    "LoRA + ZeRO-3 with offload": (["--deepspeed", "zero3_offload"], 16, 6),
    "QLoRA": (["--train_mode", "qlora"], None, 8),
    "DoRA": (["--use_dora", "true"], None, None),
    "full": (["--train_mode", "full"], None, None),
}

# runs main_train.py and writes down what it took; a peak of PyTorch's allocator on a GPU, of the process on a CPU
MEASURED = """
import json, resource, sys
import torch
import main_train
report, argv = sys.argv[1], sys.argv[2:]
main_train.main(argv)
gpu = torch.cuda.is_available()
peak = torch.cuda.max_memory_reserved() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
json.dump({"peak_gb": peak / 1e9, "allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else None},
          open(report, "w"))
"""


def make_model(shape: str, folder: Path) -> None:
    """Saves a model of the shape with random bf16 weights, and the embedded tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[shape]), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_model").save_pretrained(folder)


def make_rows(file: Path, tokens: int, rows: int) -> int:
    """Writes texts that fill `tokens` each, packed; returns how many rows there are."""
    text = " ".join(f"The number {number} comes before the number {number + 1}." for number in range(tokens))
    file.write_text("\n".join(json.dumps({"text": text}) for _ in range(rows)) + "\n", encoding="utf-8")
    return rows


def measure(way: str, model: Path, data: Path, tokens: int, steps: int, scratch: Path) -> dict:
    """Trains in one way for some steps.

    Returns:
        peak memory in GB (1e9 bytes) and tokens per second, the slow first step included, or why it did not run.
    """
    run, report = scratch / "run", scratch / "report.json"
    flags = [
        "--train_args_path", "train_args/pretrain/base.py", "--model_name_or_path", str(model), "--train_data_path",
        str(data), "--output_dir", str(run), "--overwrite_output_dir", "true", "--max_len", str(tokens),
        "--per_device_train_batch_size", "1", "--gradient_checkpointing", "true", "--max_steps", str(steps),
        "--precision", "bf16", "--save_strategy", "no", "--eval_strategy", "no", "--report_to", "none",
        "--logging_steps", "1", "--disable_tqdm", "true", "--cache_dir", str(scratch / "cache"), *WAYS[way][0],
    ]  # fmt: skip
    report.unlink(missing_ok=True)
    command = [sys.executable, "-c", MEASURED, str(report), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode or not report.is_file():
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines()[-1:]
        return {"way": way, "failed": " ".join(lines[-1:])[-300:]}
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    runtime = next(entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry)
    return {"way": way, **json.loads(report.read_text()), "tokens_per_second": round(steps * tokens / runtime, 1)}


def table(results: dict | None) -> str:
    """The table of docs/speed.md; "not measured" where no GPU was available."""
    lines = [
        "| 7B, batch 1, 2,048 tokens | reported elsewhere | goal | peak GPU memory | tokens/s |",
        "|---|---|---|---|---|",
    ]
    found = {run["way"]: run for run in results["runs"]} if results else {}
    for way, (_, reported, goal) in WAYS.items():
        run = found.get(way)
        peak = "not measured" if run is None else f"{run['peak_gb']:.1f} GB" if "peak_gb" in run else "failed"
        speed = f"{run['tokens_per_second']:,.0f}" if run and "peak_gb" in run else "not measured"
        cells = [f"{reported} GB" if reported else "–", f"at most {goal} GB" if goal else "–", peak, speed]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    if results:
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        lines += ["", f"({results['device']}; {versions})"]
    return "\n".join(lines)


def write_tables(results: dict | None) -> None:
    """Puts the table into the page that shows it."""
    write_table(ROOT / "docs" / "speed.md", "benchmarks/gpu_memory.json", table(results))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen1.5-7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "gpu_memory.json")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        if args.output == parser.get_default("output"):
            parser.error("--device cpu needs an --output of its own: the project's file is for a GPU's figures")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here; --device cpu --shape tiny tries the script itself")
    names = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes")
    versions = {name: importlib.metadata.version(name) for name in names}
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, memory of the whole process"
    results: dict = {"shape": args.shape, "tokens": args.tokens, "device": device, "versions": versions, "runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(args.shape, folder / "model")
        make_rows(folder / "rows.jsonl", args.tokens, args.steps)
        for way in args.ways:
            line = measure(way, folder / "model", folder / "rows.jsonl", args.tokens, args.steps, folder)
            print(json.dumps(line), flush=True)
            results["runs"].append(line)
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")  # a crash loses one way only
    if args.device == "cuda" and args.shape != "tiny":
        write_tables(results)


if __name__ == "__main__":
    main()
