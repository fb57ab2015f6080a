"""One case of gpu_throughput.py: a program's command, its run, and what becomes of the figures."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu_throughput_table import OURS
from benchmarks.model_flops import count, flops, peak
from benchmarks.peers import ROOT, Program, Work, environment
from benchmarks.random_work import Rows

RANK = 8  # of peers.py's adapters
NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def words_for(program: Program, case: dict, work: Work, out: Path, has: dict, compiled: bool) -> list[str]:
    """What follows `python`: the words of peers.py, and what this comparison changes; of two, the later one counts.

    Args:
        program, work, out: as in peers.py.
        case: `mode` and `setting`, see gpu_throughput.py.
        has: what `describe_gpu` says of the program's Python.
        compiled: whether torch.compile is used.
    """
    full, best = case["mode"] == "full", case["setting"] == "best"
    more = ["--logging_steps", "1", "--disable_tqdm", "true"]
    if program.name == OURS:
        more += ["--train_mode", case["mode"], "--card_samples", "0"]
        more += ["--gradient_checkpointing", "false"] if best else []
    else:
        # its own default for weights that are trained; peers.py asks for bf16, which suits a frozen base
        more += ["--use_peft", "false", "--dtype", "float32"] if full else []
        more += ["--attn_implementation", "flash_attention_2"] if best and has["flash_attention"] else []
    more += ["--use_liger_kernel", "true"] if best and has["liger"] else []
    more += ["--torch_compile", "true"] if compiled else []
    return [*program.command(work, out)[1:], *more]


def run_case(program: Program, words_of: Callable, folder: Path, minutes: float, fall_back: bool) -> dict:
    """Trains once for some steps.

    Args:
        program: in whose Python.
        words_of: gives the words of `words_for` for a run's folder.
        folder: for what the run writes, which is removed afterwards.
        minutes: after which it is given up.
        fall_back: where memory runs out, try once more with gradient checkpointing.

    Returns:
        what `timed_run` noted; or `failed`: `out of memory` or another reason.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        words = words_of(Path(scratch) / "out" / "run")
        found = _run(program, words, Path(scratch), minutes)
        if fall_back and found.get("failed") == "out of memory":
            found = _run(program, [*words, "--gradient_checkpointing", "true"], Path(scratch), minutes)
    return found


def _run(program: Program, words: list[str], scratch: Path, minutes: float) -> dict:
    report = scratch / "report.json"
    command = [str(program.python), "-m", "benchmarks.timed_run", str(report), *words]
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    env = environment(program, scratch / "clock", scratch / "cache", threads)
    shutil.rmtree(scratch / "out", ignore_errors=True)
    with open(scratch / "output", "wb") as output:
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT,
                                  timeout=60 * minutes)  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {minutes:g} minutes"}
    if done.returncode == 0 and report.is_file():
        return json.loads(report.read_text(encoding="utf-8"))
    return {"failed": why(done.returncode, (scratch / "output").read_text(errors="replace"))}


def why(returncode: int, text: str) -> str:
    """The reason of a failure, from the program's output."""
    if any(sign in text for sign in NO_MEMORY):
        return "out of memory"
    if returncode == -9:
        return "killed, as a machine without memory left does"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or [f"exit code {returncode}, and no word"])[-1][-300:]


def judge(found: dict, case: dict, rows: Rows, card: str, warm_up: int) -> dict:
    """Tokens per second, the share of the card's peak, and what a run noted; the first `warm_up` steps do not count."""
    if "failed" in found:
        return found
    seconds = found["ends"][-1] - found["ends"][warm_up - 1]
    tokens = sum(found["tokens"][warm_up:])
    # labels and length² for each token as over all rows: which row is in which step is not noted
    means = (rows.labelled / rows.tokens, rows.squares / rows.tokens)
    per_token, most = flops(count(case["shape"], RANK), case["mode"], 1, *means), peak(card)
    steps = [end - start for start, end in zip(found["ends"], found["ends"][1:], strict=False)]
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "flops_per_token": round(per_token),
        "share_of_peak": round(per_token * tokens / seconds / most, 4) if most else None,
        "peak_gb": round(found["peak_bytes"] / 1e9, 2),
        **{name: found[name] for name in ("attention", "gradient_checkpointing", "optimizer", "tokens")},
        "seconds_after_the_first_step": [round(step, 4) for step in steps],
    }


def describe(found: dict) -> str:
    """The figures of a case in a few words."""
    if "failed" in found:
        return found["failed"]
    share = f", {100 * found['share_of_peak']:.1f} % of the peak" if found["share_of_peak"] else ""
    return f"{found['tokens_per_second']:,.0f} tokens/s{share}, {found['peak_gb']:.1f} GB"
