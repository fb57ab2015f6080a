"""Plots several runs in one picture, and lists their results and the settings in which they differ.

python -m utils.script.compare_runs output/sft-a output/sft-b
python -m utils.script.compare_runs output/sft-* --output compare.png --smooth 0.9

A run that stopped before its end is plotted up to its newest checkpoint, or to where it stopped.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from utils.config.flags import arg, make_parser, read_flags, split_flags
from utils.run.compare import label_runs, read_run, settings, table
from utils.run.plot import plot_runs
from utils.runtime.command import run_command
from utils.runtime.errors import UserError, raise_if_any
from utils.runtime.log import setup_logging


@dataclass
class CompareArgs:
    """Flags of this command."""

    output: str = arg("compare.png", "The picture, a .png file.")
    overwrite: bool = arg(False, "Replace --output if it exists.")
    smooth: float | None = arg(
        None, "The weight of the moving average, from 0 (none) to below 1. Default: chosen by the number of points."
    )


def split_folders(argv: list[str]) -> tuple[list[str], list[str]]:
    """Folders and flags, in any order; a flag takes one value.

    `["a", "--smooth", "0.5", "b"]` → `(["a", "b"], ["--smooth", "0.5"])`
    """
    folders, flags = [], []
    for group in split_flags(argv):
        taken = 0 if not group[0].startswith("--") else 1 if "=" in group[0] else 2
        flags += group[:taken]
        folders += group[taken:]
    return folders, flags


def _check_output(args: CompareArgs) -> list[str]:
    if Path(args.output).suffix.lower() != ".png":
        return [f"--output {args.output!r} is not a .png"]
    if os.path.isdir(args.output) or not os.path.isdir(os.path.dirname(os.path.abspath(args.output))):
        return [_unwritable(args.output)]
    if os.path.exists(args.output) and not args.overwrite:
        return [f"--output {args.output!r} exists; give another file, or --overwrite true"]
    return []


def _unwritable(path: str, error: OSError | None = None) -> str:
    why = f": {error.strerror or error}" if error else ""
    return f"--output {path!r} cannot be written{why}; give a file in an existing folder that can be written"


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    folders, flags = split_folders(list(sys.argv[1:] if argv is None else argv))
    values, _, problems = read_flags(make_parser([CompareArgs], "utils.script.compare_runs", __doc__), flags)
    args = CompareArgs(**values)
    if len(folders) < 2:
        problems.append(f"{len(folders)} folders are given; give at least two: compare_runs DIR DIR…")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        problems.append("a folder is given twice; give each once")
    if args.smooth is not None and not 0 <= args.smooth < 1:
        problems.append(f"--smooth {args.smooth} is not allowed; give at least 0 and below 1")
    problems += _check_output(args)
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            problems += error.problems
    raise_if_any(problems)
    labels = label_runs([run.folder for run in runs])
    try:
        plot_runs(dict(zip(labels, [run.history for run in runs], strict=True)), Path(args.output), args.smooth)
    except OSError as error:
        raise UserError(_unwritable(args.output, error)) from error
    print(table(labels, runs))
    if not all(settings(run) for run in runs):
        print("\nA run without train_args.json has no settings to compare.")
    print(f"\nwritten: {Path(args.output)}")


if __name__ == "__main__":
    run_command(main)
