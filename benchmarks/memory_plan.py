"""What `utils.script.plan_memory` says against what real runs hold, on the CPU.

    python -m benchmarks.memory_plan                       # all of it; writes benchmarks/memory_plan.json
    python -m benchmarks.memory_plan --only zero3 qlora    # those that have all of these words, again

Weights, gradients and optimizer states: two processes under each ZeRO stage, to the byte. The peak of a step: one
process, as PyTorch's profiler sees every allocation; the resident memory of a process is another matter, since it
also has the libraries themselves, and memory that its allocator keeps.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from benchmarks.matrix import free_port, two_processes

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = ("none", "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
MODES = {
    "full": ["--train_mode", "full"],
    "lora": [],
    "dora": ["--use_dora", "true"],
    "qlora": ["--train_mode", "qlora"],
}
STATES = [*((mode, "bf16") for mode in MODES), ("full", "fp32")]
TOKENS = 256
PARTS = ("parameters", "gradients", "optimizer")


def flags_of(mode: str, folder: Path, *more: str) -> list[str]:
    """A run of two steps on rows that are all of `TOKENS` tokens, each of them trained."""
    data = folder / "rows.jsonl"
    if not data.exists():
        text = " ".join(f"The number {number} comes before the number {number + 1}." for number in range(TOKENS))
        data.write_text((json.dumps({"text": text}) + "\n") * 8, encoding="utf-8")
    return [
        "--train_args_path", "train_args/pretrain/base.py", "--train_data_path", str(data), "--max_len", str(TOKENS),
        "--per_device_train_batch_size", "1", "--max_steps", "2", "--output_dir", str(folder / "run"),
        "--overwrite_output_dir", "true", "--save_strategy", "no", "--eval_strategy", "no", "--report_to", "none",
        "--disable_tqdm", "true", "--cache_dir", str(folder / "cache"), "--train_special_tokens", "off",
        "--card_samples", "0", *MODES[mode], *more,
    ]  # fmt: skip


def held(layout: str, flags: list[str], folder: Path) -> dict[str, int]:
    """What the fuller of two processes holds, part by part.

    Raises:
        RuntimeError: the run failed.
    """
    report = folder / "report.json"
    env = {"REPORT": str(report), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "benchmarks" / "held.py")
    if layout == "none":
        start = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port()]
        environment = {**os.environ, **env}
        done = subprocess.run([*start, script, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
    else:
        with _environment(env):
            done = two_processes([script, "--deepspeed", layout, *flags])
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    ranks = [json.loads(Path(f"{report}.{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]
    return {part: max(rank[part] for rank in ranks) for part in PARTS}


@contextlib.contextmanager
def _environment(changes: dict):
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def planned(layout: str, flags: list[str]) -> dict[str, int]:
    """The same, as it is planned, what lies in CPU memory included."""
    from utils.args import parse_args
    from utils.memory.layout import layout_of
    from utils.memory.states import model_states
    from utils.model.meta import meta_model
    from utils.model.options import compute_dtype

    args, train_args = parse_args(flags)
    where = layout_of(layout, 2)
    model = meta_model(args, train_args, where.laid_out)
    states = model_states(args, train_args, model, where, compute_dtype(args).itemsize)
    return {part: getattr(states, part) + getattr(states, f"host_{part}") for part in PARTS}


def peaks(flags: list[str], folder: Path) -> tuple[int, int]:
    """The peak of a step in this process and as it is planned, weights and optimizer states left out."""
    import main_train
    from benchmarks.held import watch
    from utils.args import parse_args
    from utils.memory import Planner
    from utils.memory.planner import batch_of

    undo = watch(str(folder / "peak.json"), peak=True)
    try:
        main_train.main(flags)
    finally:
        undo()
    measured = json.loads((folder / "peak.json.0").read_text(encoding="utf-8"))
    args, train_args = parse_args(flags)
    batch = batch_of(args, train_args, on_gpu=False)
    if measured["trained"]:
        batch = dataclasses.replace(batch, trained=measured["trained"] / (batch.rows * (batch.tokens - 1)))
    planner = Planner(args, train_args, 1, batch)
    found = planner.estimate(planner.own())
    return measured["peak"], found.total - found.parameters - found.optimizer


def _combinations(folder: Path):
    """Yields the kind of each measurement, what tells it from the others, and a function that makes it."""

    def states(layout, flags):
        return {"held": held(layout, flags, folder), "planned": planned(layout, flags)}

    def peak(flags):
        measured, plan = peaks(flags, folder)
        return {"measured": measured, "planned": plan, "ratio": round(plan / measured, 3)}

    for (mode, precision), layout in product(STATES, LAYOUTS):
        flags = flags_of(mode, folder, "--precision", precision)
        key = {"layout": layout, "mode": mode, "precision": precision}
        yield "states", key, functools.partial(states, layout, flags)
    for mode, again, rows in product(MODES, ("false", "true"), ("1", "3")):
        more = ("--gradient_checkpointing", again, "--per_device_train_batch_size", rows)
        key = {"mode": mode, "gradient_checkpointing": again, "rows": rows}
        yield "peaks", key, functools.partial(peak, flags_of(mode, folder, *more))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="words that a combination must have, e.g. zero3 lora")
    parser.add_argument("--missing", action="store_true", help="only what the file does not have yet")
    args = parser.parse_args()
    names = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes")
    versions = {name: importlib.metadata.version(name) for name in names}
    file = ROOT / "benchmarks" / "memory_plan.json"
    results: dict = {"versions": versions, "states": [], "peaks": []}
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else results
    if before["versions"] == versions:
        results = before  # lines are measured again and replaced, the others stay
    with tempfile.TemporaryDirectory() as scratch:
        for kind, key, measure in _combinations(Path(scratch)):
            if not set(args.only) <= {kind, *map(str, key.values())}:
                continue
            others = [other for other in results[kind] if any(other[name] != key[name] for name in key)]
            if args.missing and len(others) < len(results[kind]):
                continue
            line = {**key, **measure()}
            print(json.dumps(line), flush=True)
            results[kind] = [*others, line]
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")  # a crash loses one line only
    sys.exit(not all(line["held"] == line["planned"] for line in results["states"]))


if __name__ == "__main__":
    main()
