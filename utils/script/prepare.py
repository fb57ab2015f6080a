"""Prepares the rows of a run, so that every later start with the same settings finds them; loads no model.

python -m utils.script.prepare --train_data_path my_rows.jsonl          # and any flag of main_train.py
python -m utils.script.prepare --train_data_path my_rows.jsonl --dataset_num_proc 16

Rows are kept below --cache_dir once all of them are complete. Flags that rows do not depend on, such as
--output_dir or --learning_rate, may differ later; `python main_train.py --help` lists all flags.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.args import parse_args
from utils.config.flags import make_parser, read_flags, split_own
from utils.data.report import DataReport
from utils.runtime.command import run_command
from utils.runtime.errors import UserError, raise_if_any, refusal
from utils.runtime.log import setup_logging


@dataclass
class PrepareArgs:
    """This command has no flags of its own; it takes main_train.py's."""


def summary(flag: str, report: DataReport, dataset) -> str:
    """What became of the rows of a flag: how many are kept and dropped, their tokens, and where they are.

    Args:
        flag: that names the files.
        report: of preparing them.
        dataset: the prepared rows.
    """
    dropped = f", {report.dropped_rows():,} dropped ({report.counts()})" if report.dropped else ", none dropped"
    folders = dict.fromkeys(Path(file["filename"]).resolve().parent for file in dataset.cache_files)  # of each source
    lines = [
        f"{flag}: {report.kept:,} of {report.rows:,} rows kept{dropped}",
        f"  truncated: {report.shortened:,}",
        f"  {report.token_share()}",
        *(f"  in: {folder}" for folder in folders),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    mine, rest = split_own(argv, PrepareArgs)
    setup_logging()
    problems = read_flags(make_parser([PrepareArgs], "utils.script.prepare", __doc__), mine)[2]
    try:
        args, train_args = parse_args(rest, needs_weights=False)
    except UserError as error:
        problems += error.problems
    else:
        if args.streaming:
            message = "--streaming true reads rows during the training and prepares none; leave it out"
            problems += refusal(message, "streaming")
    raise_if_any(problems)

    from utils.model.tokenizer import load_run_tokenizer
    from utils.runtime.log import route_library_logs
    from utils.template import get_run_template

    route_library_logs()
    given = args.template_date
    tokenizer = load_run_tokenizer(args)
    template = get_run_template(args, tokenizer) if args.task.uses_template else None
    data = args.task.load_datasets(args, train_args, template, tokenizer)
    print(summary("--train_data_path", data.report, data.train))
    if data.held_back:
        print(f"  held back by --val_size: {data.held_back:,} rows")
    if data.eval_report is not None:
        print(summary("--eval_data_path", data.eval_report, data.eval))
    if args.template_date != given:  # today, where the template prints a date
        print(f"The template prints the date: on another day, pass --template_date {args.template_date}")


if __name__ == "__main__":
    run_command(main)
