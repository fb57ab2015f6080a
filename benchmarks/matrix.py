"""Every ZeRO configuration, and FSDP2, with every kind of training, on two processes, against the same run on one.

    python -m benchmarks.matrix                       # all; writes matrix.json and the table in PAGES
    python -m benchmarks.matrix --only zero3 qlora    # the combinations that have all of these

Each run is the real command under DeepSpeed's launcher, or torchrun for FSDP2, on the CPU. It passes when its losses
equal those of plain `python` on the same rows per step (float32, relative 1e-4), and when plain transformers and PEFT
load what it saved: not the start values, and the weights of the one-process run.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from benchmarks.tables import write_table

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "tiny_model"
ZEROS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
FSDP2 = "fsdp2"
SHARDINGS = (*ZEROS, FSDP2)
FSDP_FLAGS = ["--fsdp", "full_shard", "--fsdp_config", '{"version": 2}']
MODES = {
    "full": ["--train_mode", "full", "--learning_rate", "1e-4"],
    "lora": [],
    "dora": ["--use_dora", "true"],
    "qlora": ["--train_mode", "qlora"],
}
RECIPES = {"sft": "train_args/sft/base.py", "dpo": "train_args/dpo/base.py"}
# the pages with the table, and the heading of its first column
PAGES = {"docs/launching.md": "two processes", "docs/zh/launching.md": "两个进程"}
# every value with every other at least once
COVERING = [
    (zero, mode, tuple(RECIPES)[(number // len(MODES) + number) % 2])
    for number, (zero, mode) in enumerate(product(ZEROS, MODES))
]


def flags_of(mode: str, task: str, folder: Path, processes: int) -> list[str]:
    """The run's flags: sixteen rows a step, whoever trains them."""
    return [
        "--train_args_path", RECIPES[task], *MODES[mode], "--output_dir", str(folder), "--max_steps", "3",
        "--per_device_train_batch_size", str(16 // processes), "--precision", "fp32", "--logging_steps", "1",
        "--warmup_steps", "0", "--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none",
        "--disable_tqdm", "true", "--card_samples", "0", "--cache_dir", str(folder.parent / "cache"),
    ]  # fmt: skip


def two_processes(words: list[str], **options) -> subprocess.CompletedProcess:
    """Runs `deepspeed --include localhost:0,1 <words>` on the CPU, or `torchrun` with the flags of FSDP2."""
    from utils.runtime.distributed import remove_shared_memory

    port = free_port()
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--master_port", port]
    env = {**os.environ, "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # children of the launcher must find the same Python
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = [*launcher, "--include", "localhost:0,1", *words]
    if "--fsdp" in words:
        command = [
            str(Path(sys.executable).parent / "torchrun"),
            "--master_port",
            port,
            "--nproc_per_node",
            "2",
            *words,
        ]
    try:
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, **options)
    finally:
        remove_shared_memory(port)  # of processes that were killed


def free_port() -> str:
    """A port nobody listens on."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def losses_of(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def one_process(mode: str, task: str, folder: Path) -> Path:
    """The same run by plain `python`."""
    command = [sys.executable, "main_train.py", *flags_of(mode, task, folder, 1)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    return folder


def trained_weights(folder: Path) -> dict:
    """What a run saved, as plain transformers and PEFT load it: name → tensor of every weight that can have moved."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if (folder / "adapter_config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folder)
        return {name: weight.detach() for name, weight in model.named_parameters() if "lora" in name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: weight.detach() for name, weight in model.named_parameters()}


def problems_of(folder: Path, alone: Path) -> list[str]:
    """What is wrong with a run of two processes, against the one of a single process."""
    import torch

    problems = []
    for step, (ours, theirs) in enumerate(zip(losses_of(folder), losses_of(alone), strict=True), 1):
        if abs(ours - theirs) > 1e-4 * abs(theirs):
            problems.append(f"loss of step {step} is {ours:.6f}, alone it is {theirs:.6f}")
    ours, theirs = trained_weights(folder), trained_weights(alone)
    if ours.keys() != theirs.keys():
        return [*problems, f"other weights are saved: {sorted(ours.keys() ^ theirs.keys())[:3]}"]
    # Adam's first steps go by a gradient's sign, which rounding may turn where it is next to nothing
    far = [name for name in ours if (ours[name] - theirs[name]).norm() > 0.05 * theirs[name].norm() + 1e-6]
    if far:
        problems.append(f"{len(far)} of {len(ours)} weights are not those of the run alone, such as {far[0]}")
    if "lora" in next(iter(ours)):
        still = [name for name in ours if "lora_B" in name and not ours[name].any()]
    else:
        start = trained_weights(BASE)
        still = [name for name in ours if torch.equal(ours[name], start[name])]
    if still:
        problems.append(f"{len(still)} weights have not moved, such as {still[0]}")
    answer = subprocess.run(
        [sys.executable, "-m", "utils.script.infer", "--model_path", str(folder), "--prompt", "Who are you?",
         "--max_new_tokens", "8"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return problems + ([f"it does not answer: {answer.stderr[-200:]}"] if answer.returncode else [])


def check(zero: str, mode: str, task: str, folder: Path, alone: Path) -> dict:
    """Runs one combination; returns its line of the results."""
    started = time.perf_counter()
    sharding = FSDP_FLAGS if zero == FSDP2 else ["--deepspeed", zero]
    done = two_processes(["main_train.py", *sharding, *flags_of(mode, task, folder, 2)])
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if re.match(r"(\[rank0\]: )?(\w+Error|error):", line)]
        problems = [f"exit code {done.returncode}: {(errors or [done.stderr[-300:]])[-1]}"]
    else:
        problems = problems_of(folder, alone)
    seconds = round(time.perf_counter() - started, 1)
    return {"zero": zero, "mode": mode, "task": task, "seconds": seconds, "problems": problems}


def table(results: dict, corner: str = "two processes") -> str:
    """The table of docs/launching.md: a row for each configuration, a column for each kind of training.

    corner: the heading of its first column.
    """
    found: dict = {}
    for run in results["runs"]:
        found.setdefault((run["zero"], run["mode"]), {})[run["task"]] = not run["problems"]
    lines = [f"| {corner} | {' | '.join(MODES)} |", "|---" * (len(MODES) + 1) + "|"]
    for zero in SHARDINGS:
        cells = []
        for mode in MODES:
            tasks = found.get((zero, mode), {})
            cells.append(", ".join(f"{task} {'✓' if passed else '✗'}" for task, passed in sorted(tasks.items())) or "–")
        lines.append(f"| `{zero}` | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join([*lines, "", f"({versions})"])


def write_tables(results: dict) -> None:
    """Puts the table into the pages that show it."""
    for name, corner in PAGES.items():
        write_table(ROOT / name, "benchmarks/matrix.json", table(results, corner))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="words that a combination must have, e.g. zero3 sft")
    args = parser.parse_args()
    wanted = [c for c in product(SHARDINGS, MODES, RECIPES) if set(args.only) <= set(c)]
    names = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes")
    results: dict = {"versions": {name: importlib.metadata.version(name) for name in names}, "runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        for zero, mode, task in wanted:
            alone = Path(scratch) / f"alone-{mode}-{task}"
            if not alone.exists():
                one_process(mode, task, alone)
            line = check(zero, mode, task, Path(scratch) / f"{zero}-{mode}-{task}", alone)
            print(json.dumps(line), flush=True)
            results["runs"].append(line)
    if not args.only:
        (ROOT / "benchmarks" / "matrix.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_tables(results)
    sys.exit(any(run["problems"] for run in results["runs"]))


if __name__ == "__main__":
    main()
