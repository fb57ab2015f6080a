"""What the experiment scripts share: flags, and keeping results, figure and the README's table together."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.tables import mark, write_table
from llm_tricks.notebook import INSTALL

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "scikit-learn")
LARGEST_SEED = 2**31 - 1  # what every generator takes, with something added too


def run_experiment(
    file: str, about: str, experiment: Callable, table: Callable, figure: Callable, seeds: int = 3
) -> None:
    """The command line of a trick's `run.py`.

    Args:
        file: the script's `__file__`.
        about: its docstring, for `--help`.
        experiment: (seeds: list[int], long: bool) → results that JSON can hold.
        table: results → the README's table, in Markdown.
        figure: results → a matplotlib figure.
        seeds: how many seeds there are when no flag says so.

    Raises:
        SystemExit: (2) a flag, a missing package or a missing file, in one message.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)), help="default: %(default)s")
    parser.add_argument("--long", action="store_true", help="the longer experiment, some minutes")
    parser.add_argument("--write", action="store_true", help="keep results and figure here, and the README's table")
    args = parser.parse_args()
    folder, started = Path(file).resolve().parent, time.perf_counter()
    name = "results_long" if args.long else "results"
    try:
        if problem := problem_of(args, folder / "README.md", f"{name}.json"):
            parser.error(problem)
        results = {"command": command_of(folder.name, args, parser.get_default("seeds")), "seeds": args.seeds}
        results |= {"cpu_cores": os.cpu_count(), "versions": versions()} | experiment(args.seeds, args.long)
        results["seconds"] = round(time.perf_counter() - started, 1)
        print(with_origin(table, results))
        print(f"{results['seconds']} s")
        if args.write:
            (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            figure(results).savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
            write_table(folder / "README.md", f"{name}.json", with_origin(table, results))
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is missing; {INSTALL}")
    except OSError as error:
        parser.error(f"a file of the repository is missing or cannot be used: {error}")


def problem_of(args: argparse.Namespace, readme: Path, name: str) -> str | None:
    """What is wrong with the flags; `name` is the file that `--write` would make."""
    wrong = [seed for seed in dict.fromkeys(args.seeds) if not 0 <= seed <= LARGEST_SEED or args.seeds.count(seed) > 1]
    if wrong:
        return f"--seeds {' '.join(map(str, wrong))}: allowed are whole numbers from 0 to {LARGEST_SEED}, each once"
    if args.write and mark(name) not in readme.read_text(encoding="utf-8"):
        return f"README.md has no table for {name}; here --write goes {'without' if args.long else 'with'} --long"
    return None


def command_of(trick: str, args: argparse.Namespace, default: list[int]) -> str:
    """The command that makes these results."""
    words = ["python", "-m", f"llm_tricks.{trick}.run", *["--long"] * args.long, "--write"]
    return " ".join(words + (["--seeds", *map(str, args.seeds)] if args.seeds != default else []))


def versions() -> dict[str, str]:
    """The packages the figures can depend on, those that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def with_origin(table: Callable, results: dict) -> str:
    """The README's table, and a line below it with the seeds and versions."""
    packages = ", ".join(" ".join(pair) for pair in results["versions"].items())
    return f"{table(results)}\n\nSeeds {', '.join(map(str, results['seeds']))}; {packages}."


def mean_and_spread(values: list[float], digits: int = 1, scale: float = 1.0) -> str:
    """`mean ± standard deviation` over seeds, for a table."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values) * scale:.{digits}f} ± {spread * scale:.{digits}f}"
