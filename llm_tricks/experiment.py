"""What the experiment scripts share: flags, and keeping results, figure and the README's table together."""

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.tables import write_table
from llm_tricks.notebook import INSTALL


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
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)), help="default: %(default)s")
    parser.add_argument("--long", action="store_true", help="the longer experiment, some minutes")
    parser.add_argument("--write", action="store_true", help="keep results and figure here, and the README's table")
    args = parser.parse_args()
    folder, started = Path(file).resolve().parent, time.perf_counter()
    name = "results_long" if args.long else "results"
    results = {
        "command": f"python -m llm_tricks.{folder.name}.run" + " --long" * args.long + " --write",
        "seeds": args.seeds,
        "cpu_cores": os.cpu_count(),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")},
    }
    try:
        results |= experiment(args.seeds, args.long)
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is missing; {INSTALL}")
    results["seconds"] = round(time.perf_counter() - started, 1)
    print(table(results))
    print(f"{results['seconds']} s")
    if args.write:
        (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        figure(results).savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        write_table(folder / "README.md", f"{name}.json", table(results))


def mean_and_spread(values: list[float], digits: int = 1, scale: float = 1.0) -> str:
    """`mean ± standard deviation` over seeds, for a table."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values) * scale:.{digits}f} ± {spread * scale:.{digits}f}"
