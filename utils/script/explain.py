"""Shows what a run would do, and where each of its values comes from. Takes every flag of main_train.py.

python -m utils.script.explain
python -m utils.script.explain --train_mode full --lora_rank 8 --max_steps 100 --processes 8
python -m utils.script.explain --config output/sft/train_args.json --learning_rate 1e-3 --diff output/sft
python -m utils.script.explain --json true > run.json

Rows are prepared and cached as by a run; no weights are loaded and nothing is trained. Arguments that main_train.py
refuses are refused here too.
"""

import json
from dataclasses import dataclass

from utils.args import parse_with_sources
from utils.config.flags import arg, make_parser, read_flags, split_own
from utils.runtime.command import run_command
from utils.runtime.distributed import world_size
from utils.runtime.errors import UserError, raise_if_any
from utils.runtime.log import is_main_process, setup_logging


@dataclass
class ExplainArgs:
    """Flags of this command; all others are main_train.py's."""

    all: bool = arg(False, "Show every value, also defaults and those without effect.")
    json: bool = arg(False, "Print one JSON object with everything, for other programs; messages go to stderr.")
    diff: str | None = arg(None, "A run's folder, or its train_args.json: show what differs from it.")
    processes: int | None = arg(None, "The number of processes to plan for. Default: as many as were started.")


def main(argv: list[str] | None = None) -> None:
    mine, rest = split_own(argv, ExplainArgs)
    setup_logging()
    parser = make_parser([ExplainArgs], "utils.script.explain", __doc__)
    values, _, problems = read_flags(parser, mine)
    flags = ExplainArgs(**values)
    if flags.processes is not None and not 1 <= flags.processes <= 1024:
        problems.append(f"--processes {flags.processes} is not allowed; give a whole number from 1 to 1024")

    from utils.explain.diff import compare, read_earlier

    try:
        then = read_earlier(flags.diff)
    except UserError as error:
        problems += error.problems
    try:
        args, train_args, sources = parse_with_sources(rest)
    except UserError as error:
        problems += error.problems
    raise_if_any(problems)

    from utils.explain.explain import explain
    from utils.explain.report import text_of
    from utils.runtime.log import route_library_logs

    route_library_logs()
    explained = explain(args, train_args, sources, flags.processes or world_size())
    diff = compare(flags.diff, then, explained) if then is not None else None
    if not is_main_process():
        return
    if flags.json:
        report = explained.as_json() | ({"diff": diff} if diff is not None else {})
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print(text_of(explained, flags.all, diff))


if __name__ == "__main__":
    run_command(main)
