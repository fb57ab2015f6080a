"""Proves on your own model and rows what a training relies on, before you pay for the training.

python -m utils.script.prove                                            # the embedded model on its sample rows
python -m utils.script.prove --model_name_or_path Qwen/Qwen1.5-7B-Chat --train_data_path my_rows.jsonl --max_len 512
python -m utils.script.prove --only padding_free packed stops --rows 4  # and any flag of main_train.py
python -m utils.script.prove --list

Each proof computes the same figures in two ways and prints both, their difference, and the tolerance for rounding.
Everything is computed in float32, on a few of your rows; temporary files are removed. Exit code 0: every proof that
applies holds; 1: one does not; 2: the input cannot be used.
"""

import json
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from utils.config.flags import arg, make_parser, read_flags, split_own
from utils.prove.arguments import make_subject
from utils.prove.report import as_json, lines_of, show_list
from utils.runtime.command import run_command
from utils.runtime.distributed import world_size
from utils.runtime.errors import nearest, raise_if_any
from utils.runtime.log import setup_logging


@dataclass
class ProveArgs:
    """Flags of this command; all others are those of main_train.py."""

    only: list[str] | None = arg(None, "The proofs to run, by name; see --list. Default: all.")
    rows: int = arg(8, "The number of rows to use, of different lengths.")
    list: bool = arg(False, "Print what each proof shows, how, and its tolerance, and run none.")
    json: bool = arg(False, "Print one JSON object at the end instead of lines.")


def parse(argv: list[str] | None = None) -> tuple[ProveArgs, list[str]]:
    """Reads this command's own flags.

    Returns:
        them, and all other flags, which are main_train.py's.

    Raises:
        UserError: with every problem at once.
    """
    from utils.prove.registry import PROOFS

    mine, rest = split_own(argv, ProveArgs)
    values, _, problems = read_flags(make_parser([ProveArgs], "utils.script.prove", __doc__), mine)
    args = ProveArgs(**values)
    for name in args.only or []:
        if name not in PROOFS:
            problems.append(f"--only {name!r} is not a proof.{nearest(name, PROOFS)} Allowed: {', '.join(PROOFS)}")
    if args.rows < 2:
        problems.append(f"--rows {args.rows} is not allowed; give a whole number of at least 2")
    if world_size() > 1:
        problems.append("prove starts the processes it needs itself; start it with plain python, without a launcher")
    raise_if_any(problems)
    return args, rest


def prove(args: ProveArgs, flags: list[str], scratch: Path) -> bool:
    """Runs the proofs and prints their outcomes; returns whether all that apply hold."""
    from tqdm import tqdm

    subject = make_subject(flags, args.rows, scratch)

    from utils.prove.registry import PROOFS, run_proofs

    names, outcomes = args.only or list(PROOFS), []
    with tqdm(total=len(set(names)), unit="proof", leave=False) as bar:
        for outcome in run_proofs(names, subject, bar.set_description):
            outcomes.append(outcome)
            tqdm.write(lines_of(outcome), file=sys.stderr if args.json else sys.stdout)
            bar.update()
    failed = sum(outcome.verdict.holds is False for outcome in outcomes)
    if args.json:
        print(json.dumps(as_json(outcomes, subject), indent=2, ensure_ascii=False))
    else:
        held = sum(outcome.verdict.holds is True for outcome in outcomes)
        print(f"{held} hold, {failed} do not, {len(outcomes) - held - failed} do not apply")
    return not failed


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args, flags = parse(argv)
    if args.list:
        print(show_list())
        return
    # SystemExit instead of the default, so that temporary folders and processes are removed
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="llm_dojo-prove-") as scratch:
            holds = prove(args, flags, Path(scratch))
    finally:
        signal.signal(signal.SIGTERM, previous)
    if not holds:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
