"""Tokens per second, and the share of the card's peak arithmetic, beside TRL's own script on the same GPU.

    python -m benchmarks.gpu_throughput                             # all cases once
    python -m benchmarks.gpu_throughput --shapes 7b --modes lora    # some; what was measured before is kept
    python -m benchmarks.gpu_throughput --minutes 8                 # starts no case later; call again to go on
    python -m benchmarks.gpu_throughput --table                     # only writes the table
    python -m benchmarks.gpu_throughput --shapes tiny --device cpu --output /tmp/try.json   # the script itself

Qwen2.5's shapes with random weights, on random rows; nothing is fetched. `default`: each program's defaults in bf16;
`best`: packed rows, flash attention and Liger's kernels where installed, and no gradient checkpointing unless memory
runs out. Results go to benchmarks/results/gpu_throughput.json after every case: a crash costs one, and the same command
goes on with what is missing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.gpu_throughput_table import MODES, OURS, SETTINGS, SHOWN, TRL, key, table
from benchmarks.model_flops import SHAPES
from benchmarks.peers import ROOT, Program, Work
from benchmarks.random_work import make_rows
from benchmarks.tables import write_table
from benchmarks.timed_case import describe, judge, run_case, words_for

RESULTS = ROOT / "benchmarks" / "results" / "gpu_throughput.json"
DEPENDS_ON = ("card", "versions", "settings")  # results of other ones are not mixed


def cases_of(args) -> list[dict]:
    """All cases, those that tell most first, the programs taking turns."""
    programs = [OURS] if args.peer == "none" else [OURS, TRL]
    order = product(range(args.repeats), args.modes, args.shapes, args.settings, programs)
    return [
        {"shape": shape, "mode": mode, "setting": setting, "program": program, "repeat": repeat}
        for repeat, mode, shape, setting, program in order
    ]


def described(python: str) -> dict:
    """What `describe_gpu` says of a Python."""
    command = [python, "-m", "benchmarks.describe_gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        make_parser().error(f"{python} cannot be used: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def model_for(shape: str, args) -> Path:
    """The folder of a random model, made in a process of its own so that the card is free again afterwards."""
    folder = args.folder.resolve() / f"{shape}-{args.seed}"
    if not folder.is_dir():
        command = [sys.executable, "-m", "benchmarks.random_work", shape, str(folder), args.device, str(args.seed)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"error: no model of the shape {shape} could be made:\n{done.stderr[-1500:]}")
    return folder


def measure(args, kept: dict, has: dict[str, dict]) -> None:
    """Runs what is not measured yet, and keeps the results after each case.

    Args:
        args: the flags.
        kept: the results so far; changed, and written to `--output`.
        has: program → what `describe_gpu` says of its Python.
    """
    # what did not fit will not fit; what failed otherwise is tried again
    done = {key(run) for run in kept["runs"] if run.get("failed", "out of memory") == "out of memory"}
    wanted = [case for case in cases_of(args) if key(case) not in done]
    data = args.folder.resolve() / f"rows-{args.rows}x{args.steps}-{args.max_len}-{args.seed}"
    rows, start = make_rows(data, args.rows * (args.steps + 1), args.max_len, args.seed), time.monotonic()
    kept["data"] = asdict(rows)
    for number, case in enumerate(wanted):
        if args.minutes is not None and time.monotonic() - start >= 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over, {len(wanted) - number} cases are left; call again to go on")
            return
        print(f"{number + 1} of {len(wanted)}  {' '.join(map(str, key(case)))}: ", end="", flush=True)
        best = case["setting"] == "best"
        rows_a_step = max(1, args.rows // 4) if best else args.rows  # a packed row holds four on average
        work = Work(model_for(case["shape"], args), data, rows_a_step, best, args.steps, args.max_len, args.seed)
        program = Program(case["program"], Path(args.peer_python if case["program"] == TRL else sys.executable),
                          {"HF_HUB_OFFLINE": "1"})  # fmt: skip
        words_of = partial(words_for, program, case, work, has=has[program.name], compiled=args.torch_compile)
        found = run_case(program, words_of, args.folder, args.case_minutes, fall_back=best)
        found = judge(found, case, rows, kept["card"]["name"], args.warm_up)
        kept["runs"] = [run for run in kept["runs"] if key(run) != key(case)] + [{**case, **found}]
        keep(kept, args.output)
        print(describe(found), flush=True)


def keep(results: dict, file: Path) -> None:
    """Writes the results, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_throughput", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHOWN))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="what is trained")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["best", "default"])
    parser.add_argument("--peer", choices=["trl", "none"], default="trl", help="what to compare with (trl)")
    parser.add_argument("--peer_python", default=sys.executable, help="the Python that has the peer (this one)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a run (20)")
    parser.add_argument("--warm_up", type=int, default=5, help="of them, so many at first do not count (5)")
    parser.add_argument("--rows", type=int, default=16, help="rows a step; packed, a quarter as many full ones (16)")
    parser.add_argument("--max_len", type=int, default=2048, help="tokens of the longest row (2048)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--torch_compile", action="store_true", help="compile the model, in both programs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script")
    parser.add_argument("--minutes", type=float, help="start no case after so many")
    parser.add_argument("--case_minutes", type=float, default=10, help="give a case up after so many (10)")
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "gpu_throughput", help="models and rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="leave earlier results in --output out")
    parser.add_argument("--table", action="store_true", help="only write the table of the kept results")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags; all problems with them are printed at once, with exit code 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    least = {"steps": 2, "warm_up": 1, "rows": 1, "max_len": 64, "repeats": 1, "seed": 0, "minutes": 0}
    problems = [
        f"--{name} {value} is not allowed; give at least {minimum}"
        for name, minimum in least.items()
        if (value := getattr(args, name)) is not None and value < minimum
    ]
    if args.warm_up >= args.steps:
        problems.append(f"--warm_up {args.warm_up} leaves none of --steps {args.steps}; give fewer")
    if args.case_minutes <= 0:
        problems.append(f"--case_minutes {args.case_minutes:g} is not allowed; give more than 0")
    if shutil.which(args.peer_python) is None:
        problems.append(f"--peer_python {args.peer_python!r} is no program; give the path of a Python")
    if args.device == "cpu" and args.output == RESULTS and not args.table:
        problems.append("--device cpu needs an --output of its own: the project's file is for a GPU's figures")
    if problems:
        parser.error("\n  ".join(problems))
    return args


def read_results(file: Path) -> dict | None:
    """The results in a file, None where there is none; a file of something else ends the program with exit code 2."""
    if not file.exists():
        return None
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        table(results)
    except (ValueError, KeyError, TypeError):
        make_parser().error(f"--output {str(file)!r} holds something else than results; give another file")
    return results


def open_results(args, found: dict) -> dict:
    """The results to go on with; those of other conditions are refused, not mixed.

    Raises:
        SystemExit: with exit code 2.
    """
    names = ("steps", "warm_up", "rows", "max_len", "seed", "torch_compile")
    now = {**found, "settings": {name: getattr(args, name) for name in names}}
    if args.again or not args.output.exists():
        return {**now, "runs": []}
    kept = read_results(args.output)
    other = [name for name in DEPENDS_ON if kept[name] != now[name]]
    if other:
        make_parser().error(
            f"{args.output} holds results with other {' and '.join(other)}; give another --output, or --again to "
            "replace them"
        )
    return {**now, "runs": kept["runs"]}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not args.table:
        found = described(sys.executable)
        if args.device == "cuda" and found["card"]["name"] == "CPU":
            make_parser().error("there is no GPU here; --shapes tiny --device cpu --output FILE tries the script")
        theirs = found if args.peer_python == sys.executable else described(args.peer_python)
        args.folder.mkdir(parents=True, exist_ok=True)
        kept = open_results(args, {**found, "peer_versions": theirs["versions"]})
        measure(args, kept, {OURS: found, TRL: theirs})
    results = read_results(args.output)
    print(table(results, SHOWN if args.table or args.output == RESULTS else args.shapes))
    if args.output == RESULTS:
        write_table(ROOT / "benchmarks" / "README.md", "results/gpu_throughput.json", table(results))


if __name__ == "__main__":
    main()
