"""This project beside TRL's own script and LLaMA-Factory, on the same work, in one go.

    python benchmarks/compare.py --data alpaca_en_52k.jsonl          # all of it, hours on two cores
    python benchmarks/compare.py --data … --only default vocabulary  # some cases; the others' results are kept
    python benchmarks/compare.py --table                             # the tables again, from the kept results

Each peer runs in a virtual environment of its own, made at the first start. All train the same random model on the same
rows with the same adapter, precision, optimizer and seed; the runs of a case follow each other, so that what slows the
machine slows all. Results go to benchmarks/results/compare.json, each run with its seconds and memory.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.compare_table import OURS, PEERS, in_chinese, table  # noqa: E402
from benchmarks.compare_work import answered_rows, endless_rows, key_of, made_once, make_base, trained_tokens  # noqa: E402
from benchmarks.peers import Program, Work, environment, programs, write_rows  # noqa: E402
from benchmarks.tables import write_table  # noqa: E402
from utils.runtime.errors import UserError, nearest, raise_if_any  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "compare.json"
# case → (shape, rows, what is changed of the work, whether a second run follows on what the first prepared)
CASES = {
    "default": ("small", 1000, {}, False),
    "best": ("small", 1000, {"packing": True, "rows_a_step": 1}, False),
    "vocabulary": ("vocabulary", 240, {}, False),
    "first step": ("small", 1000, {"max_steps": 1}, False),
    "preparing": ("small", None, {"max_steps": 1, "prepare_with": 2}, True),
}
WHOLE_RUNS = ("default", "best", "vocabulary")  # of the others only the time to the first step counts
_NAMES = {name.lower(): name for name in (OURS, *PEERS)}
MANY, MANY_ROWS = "many rows", (100_000, 1_000_000)  # this project's memory, whatever the number of rows


def run(program: Program, work: Work, scratch: Path, threads: int) -> dict:
    """Runs one command to its end.

    Returns:
        seconds to the first optimizer step, seconds between the first and the last, steps, peak memory in bytes of the
        largest process; or the error.
    """
    clock, out = scratch / "clock", scratch / "out" / "run"
    shutil.rmtree(out, ignore_errors=True)
    clock.unlink(missing_ok=True)
    words, env = program.command(work, out), environment(program, clock, scratch / "cache", threads)
    with open(scratch / "output", "wb") as output:
        start = time.time()
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not clock.exists():
        return {"error": (scratch / "output").read_text(errors="replace")[-1500:]}
    steps = [float(line) for line in clock.read_text().split()]
    return {
        "first_step": steps[0] - start,
        "training": steps[-1] - steps[0],
        "steps": len(steps),
        "peak": usage.ru_maxrss * 1024,
        "whole": time.time() - start,
    }


def measure_case(case: str, some: list[Program], args) -> tuple[list[dict], int | None]:
    """All repeats of a case, the programs taking turns.

    Returns:
        the runs, and how many tokens the rows train, where that counts
    """
    shape, count, changes, again = CASES[case]
    rows = answered_rows(args.data)
    rows = rows[: min(args.rows or len(rows), count or len(rows))]
    work = replace(_work(shape, args, len(rows), rows), **changes)
    found = []
    for repeat, program in itertools.product(range(args.repeats), some):
        turns = ("first", "again") if again else ("first",)
        found += _runs(case, program, repeat, [(turn, work) for turn in turns], args)
    return found, trained_tokens(work) if case in WHOLE_RUNS else None


def measure_many_rows(some: list[Program], args) -> list[dict]:
    """This project's peak memory on few and on many rows, which it prepares and begins to train on."""
    found, ours = [], [program for program in some if program.name == OURS]
    for repeat, count, program in itertools.product(range(args.repeats), args.many_rows, ours):
        work = replace(_work("small", args, f"{count}-numbered", endless_rows(args.data, count)), max_steps=3)
        found += _runs(MANY, program, repeat, [(str(count), work)], args)
    return found


def _work(shape: str, args, name, rows) -> Work:
    key = key_of(args.data)
    base = made_once(args.folder / f"{shape}-{key}", lambda part: make_base(shape, part, args.data))
    return Work(base, made_once(args.folder / f"data-{name}-{key}", lambda part: write_rows(part, rows)))


def _runs(case: str, program: Program, repeat: int, turns: list[tuple[str, Work]], args) -> list[dict]:
    """A program's runs of one repeat, the later ones on what the first prepared."""
    found = []
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        for turn, work in turns:
            measured = run(program, work, Path(scratch), args.threads)
            found.append({"case": case, "program": program.name, "repeat": repeat, "turn": turn, **measured})
            print(json.dumps(found[-1]), flush=True)
    return found


def machine(threads: int) -> dict:
    """What the figures depend on."""
    from utils.runtime.environment import hardware

    names = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
    return {"hardware": hardware(), "threads": threads, "versions": {n: importlib.metadata.version(n) for n in names}}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/compare.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--data", type=Path, help="alpaca rows, a jsonl file")
    parser.add_argument("--only", nargs="+", choices=[*CASES, MANY], default=[*CASES, MANY], help="the cases to run")
    parser.add_argument("--programs", nargs="+", help="those to run; all three by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, help="rows at most, to try the script out")
    parser.add_argument("--many_rows", type=int, nargs=2, default=MANY_ROWS, help="of the case of that name")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each run")
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "compare", help="models, rows, environments")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the tables from the kept results")
    args = parser.parse_args(argv)
    args.programs = [_NAMES.get(name.lower(), name) for name in args.programs or _NAMES.values()]
    args.folder = args.folder.absolute()  # the runs have a working folder of their own
    raise_if_any(_problems(args))
    return args


def _problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags and the rows, before anything is installed."""
    counts = {name: getattr(args, name) for name in ("repeats", "rows", "threads")}
    counts |= {"many_rows": min(args.many_rows)}
    problems = [
        f"--{name} {count} is not allowed; give a whole number of at least 1"
        for name, count in counts.items()
        if count is not None and count < 1
    ]
    for name in args.programs:
        if name not in _NAMES.values():
            allowed = ", ".join(_NAMES.values())
            problems.append(f"--programs {name!r} is none.{nearest(name, _NAMES.values())} Allowed: {allowed}")
    problems += _problems_of_output(args.output)
    if args.table:
        return problems
    if args.output == RESULTS and (args.rows or tuple(args.many_rows) != MANY_ROWS):
        problems.append("--rows and --many_rows are to try the script out; give an --output of its own with them")
    if any(place.exists() and not place.is_dir() for place in (args.folder, *args.folder.parents)):
        problems.append(f"--folder {str(args.folder)!r} is no folder, or lies in what is none; give another")
    return problems + _problems_of_rows(args.data)


def _problems_of_output(output: Path) -> list[str]:
    """Results of hours are not to be lost at the end."""
    there = next(place for place in (output, *output.absolute().parents) if place.exists())
    if output.is_dir() or (there != output and not there.is_dir()) or not os.access(there, os.W_OK):
        return [f"--output {str(output)!r} cannot be written; give another file"]
    if output.exists():
        try:
            json.loads(output.read_text(encoding="utf-8"))["runs"]
        except (ValueError, KeyError, TypeError):
            return [f"--output {str(output)!r} holds no results of this script; remove it or give another file"]
    return []


def _problems_of_rows(data: Path | None) -> list[str]:
    if data is None or not data.is_file():
        return [f"--data {str(data)!r} is no file; give a jsonl file of alpaca rows" if data else
                "--data is missing; give a jsonl file of alpaca rows"]  # fmt: skip
    answers = 0
    for number, line in enumerate(data.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = (row["instruction"], row["output"], row.get("input", ""))
        except (ValueError, TypeError, KeyError, AttributeError):
            texts = (None,)
        if not all(isinstance(text, str) for text in texts):
            return [f"{data}:{number} is no alpaca row; each line is an object with the texts instruction and output"]
        answers += bool(texts[1].strip())
    return [] if answers else [f"--data {str(data)!r} has no row with an answer"]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    kept = json.loads(args.output.read_text()) if args.output.exists() else {"runs": [], "trained_tokens": {}}
    failed = [] if args.table else _measure(args, kept)
    print(table(kept))
    if args.output == RESULTS:
        for page in (ROOT / "README.md", ROOT / "README_zh.md", ROOT / "benchmarks" / "README.md"):
            written = in_chinese(table(kept)) if page.stem.endswith("zh") else table(kept)
            write_table(page, "results/compare.json", written)
    if failed:
        print(f"{len(failed)} of the runs failed; their output is above and in {args.output}", file=sys.stderr)
        sys.exit(1)


def _measure(args, kept: dict) -> list[dict]:
    """Runs the cases and keeps each at once, in place of what its programs had; returns the runs that failed."""
    args.folder.mkdir(parents=True, exist_ok=True)
    some, failed = programs(args.folder, args.programs), []
    kept |= machine(args.threads)
    for case in args.only:
        found, tokens = (measure_many_rows(some, args), None) if case == MANY else measure_case(case, some, args)
        replaced = {(case, one["program"]) for one in found}
        kept["runs"] = [one for one in kept["runs"] if (one["case"], one["program"]) not in replaced] + found
        if tokens is not None:
            kept["trained_tokens"][case] = tokens
        failed += [one for one in found if "error" in one]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        part = args.output.with_name(f"{args.output.name}.part")
        part.write_text(json.dumps(kept, indent=1) + "\n")
        part.replace(args.output)  # a crash costs one case, never half a file
    return failed


if __name__ == "__main__":
    try:  # not by run_command, which would limit the kernels that the peers keep as well
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
