"""Shows the rows of a run with the highest losses, those that may be mislabelled, and those that were forgotten.

python -m utils.script.ledger output/sft-20260101-120000
python -m utils.script.ledger output/sft-20260101-120000 --top 50 --which mislabelled --write suspects.jsonl

The run needs `--row_ledger true`. A checkpoint's folder can be given as well. Losses are in nats per trained token,
or per pair, each measured in training before the step that trained the row.
"""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.config.flags import arg, make_parser, read_flags, split_flags
from utils.run.ledger_rows import SELECTIONS, as_json_line, columns_of, data_files, read_raw_rows, read_run_ledger
from utils.runtime.command import run_command
from utils.runtime.errors import UserError, raise_if_any
from utils.runtime.log import setup_logging
from utils.runtime.text import format_count, on_one_line
from utils.storage.files import is_one_of, write_text
from utils.train.row_ledger import RowLedger, format_counts

_MAX_CHARS = 300  # of a row that is shown


@dataclass
class LedgerArgs:
    """Flags of this command."""

    top: int = arg(10, "How many rows of each list to show, and of --which to write.")
    which: Literal[tuple(SELECTIONS)] = arg("worst", "The list that --write writes.")
    write: str | None = arg(
        None, "A new .jsonl file for the rows of --which, as they are in the data files; these must be unchanged."
    )
    overwrite: bool = arg(False, "Replace the file of --write if it exists.")


def split_folder(argv: list[str]) -> tuple[list[str], list[str]]:
    """Folders and flags, in any order: `["run", "--top", "5"]` → `(["run"], ["--top", "5"])`."""
    folders, flags = [], []
    for group in split_flags(argv):
        taken = 0 if not group[0].startswith("-") else 1 if "=" in group[0] or group[0] == "-h" else 2
        flags += group[:taken]
        folders += group[taken:]
    return folders, flags


def _check(args: LedgerArgs, folders: list[str], files: list[str]) -> list[str]:
    """The problems of the flags; `files` are the data files of the run."""
    problems = []
    if len(folders) != 1:
        problems.append(f"{len(folders)} folders are given; give one: ledger RUN")
    if args.top < 1:
        problems.append(f"--top {args.top} is not allowed; give a whole number of at least 1")
    if args.write is not None:
        flag = f"--write {args.write!r}"
        if Path(args.write).suffix.lower() != ".jsonl":
            problems.append(f"{flag} is not a .jsonl")
        elif os.path.isdir(args.write) or not os.path.isdir(os.path.dirname(os.path.abspath(args.write))):
            problems.append(f"{flag} cannot be written; give a file in an existing folder that can be written")
        elif is_one_of(args.write, files):
            problems.append(f"{flag} is a data file of the run; give another file")
        elif os.path.exists(args.write) and not args.overwrite:
            problems.append(f"{flag} exists; give another file, or --overwrite true")
    return problems


def heading(ledger: RowLedger, folder: str) -> str:
    """What the ledger covers, and how many rows are in which state."""
    note = ledger.note
    once = int((ledger.rows["times"] == 1).sum())
    lines = [
        f"row ledger of {folder}, steps {note.first_step + 1:,} to {note.step:,}",
        f"  {format_counts(ledger.counts())}",
    ]
    if note.first_step:
        lines.append(f"  the ledger begins after step {note.first_step:,}: the run had none before, or of other files")
    if once:
        lines.append(f"  {format_count(once, 'row')} trained once only, so that their losses show no change")
    return "\n".join(lines)


def show_list(ledger: RowLedger, name: str, top: int, texts: dict) -> str:
    """The first rows of a list, with their losses, places and texts.

    Args:
        ledger: of the run.
        name: a key of `SELECTIONS`.
        top: how many rows.
        texts: index → the row as it is in its file, where it could be read.
    """
    indices, rows = SELECTIONS[name].pick(ledger), ledger.rows
    lines = [f"\n{name}: {SELECTIONS[name].title}{'' if len(indices) else _none(ledger, name)}"]
    for index in indices[:top]:
        losses = ", ".join(f"{part} {rows[f'{part}_loss'][index]:.3f}" for part in ("last", "first", "best", "mean"))
        lines.append(f"  {ledger.place(index)}  {losses}; {format_count(int(rows['times'][index]), 'time')}")
        if index in texts:
            text = on_one_line(as_json_line(texts[index]))
            lines.append(f"    {text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + ' …'}")
    if len(indices) > top:
        lines.append(f"  … and {len(indices) - top:,} more")
    return "\n".join(lines)


def _none(ledger: RowLedger, name: str) -> str:
    """Why a list is empty."""
    why = SELECTIONS[name].why_not(ledger)
    return f". Not looked for: {why}" if why else ". None"


def write_rows(ledger: RowLedger, args: LedgerArgs) -> str:
    """Writes the raw rows of a list as JSON Lines; returns what was done, as a sentence.

    Raises:
        UserError: the list was not looked for, a file was changed since the run, or the output cannot be written.
    """
    if why := SELECTIONS[args.which].why_not(ledger):
        raise UserError(f"--write {args.write!r}: {args.which} rows are not looked for: {why}")
    indices = SELECTIONS[args.which].pick(ledger)[: args.top]
    rows, problems = read_raw_rows(ledger, indices)
    raise_if_any([f"--write {args.write!r}: {problem}" for problem in problems])
    try:
        write_text(Path(args.write), "".join(as_json_line(rows[index]) + "\n" for index in indices))
    except OSError as error:
        raise UserError(f"--write {args.write!r} cannot be written: {error.strerror or error}") from error
    written = f"\nwritten: {args.write}, {format_count(len(indices), 'row')} ({args.which})"
    flags = [f"--columns {shlex.quote(columns)}" for columns in columns_of(ledger, indices)]
    if flags:
        each = "; their files have different ones" if len(flags) > 1 else ""
        written += f"\n  to train them, add {' or '.join(flags)}, as they have the fields of their file{each}"
    return written


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    folders, flags = split_folder(list(sys.argv[1:] if argv is None else argv))
    values, _, problems = read_flags(make_parser([LedgerArgs], "utils.script.ledger", __doc__), flags)
    args = LedgerArgs(**values)
    ledger, files = None, []
    if folders:
        try:
            ledger = read_run_ledger(folders[0])
            files = data_files(folders[0], ledger)
        except UserError as error:
            problems += error.problems
    raise_if_any(problems + _check(args, folders, files))
    written = write_rows(ledger, args) if args.write else ""  # first, as it may be refused
    shown = {int(index) for selection in SELECTIONS.values() for index in selection.pick(ledger)[: args.top]}
    texts, unreadable = read_raw_rows(ledger, sorted(shown))
    print(heading(ledger, folders[0]))
    for problem in unreadable:
        print(f"  {problem}, so its rows are shown without their texts")
    for name in SELECTIONS:
        print(show_list(ledger, name, args.top, texts))
    if written:
        print(written)


if __name__ == "__main__":
    run_command(main)
