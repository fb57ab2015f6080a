"""Checks rows, template, settings, disk and memory before a training, without using a GPU.

python -m utils.script.doctor --train_data_path my_rows.jsonl           # and any flag of main_train.py
python -m utils.script.doctor --json true > report.json

The exit code is 0 if nothing was found, 1 with warnings, 2 with errors.
"""

import contextlib
import sys
from dataclasses import dataclass

from loguru import logger

from utils.args import parse_args
from utils.config.flags import arg, flag_of, make_parser, read_flags, split_flags, split_own
from utils.doctor.examine import Examination, diagnose
from utils.doctor.findings import as_json, as_text, catalogue, exit_code, findings_of
from utils.runtime.command import run_command
from utils.runtime.distributed import world_size
from utils.runtime.errors import Problem, UserError, raise_if_any
from utils.runtime.log import route_library_logs, setup_logging
from utils.runtime.text import format_count
from utils.storage.files import ROOT

CODES_PAGE = ROOT / "utils" / "script" / "doctor.md"
_REPORT_LOGGER = "utils.data.report"  # disabled: what it logs is in the doctor's report
_SHOWN = ("task_type", "model_name_or_path", "train_data_path", "eval_data_path", "template_name", "max_len")
_RUN_FLAGS = {
    "train_args_path",
    "config",
    "task_type",
}  # without a valid one, rows cannot be read
_NEEDED = {*_RUN_FLAGS, "model_name_or_path", "train_data_path", "eval_data_path"}


@dataclass
class DoctorArgs:
    """Flags of this command; all others are main_train.py's."""

    json: bool = arg(False, "Write the report as JSON to stdout, and nothing else there.")
    processes: int = arg(0, "How many processes will train together; 0: as many as run now, 1 without a launcher.")
    write_codes: bool = arg(False, "Only update utils/script/doctor.md, the page of all codes.")


def parse_valid(argv: list[str]):
    """Parses main_train.py's flags without those that are refused, so that the rest can be examined.

    Args:
        argv: the flags.

    Returns:
        (CommonArgs and TrainArgument, both None if nothing can be parsed; all problems; the names of the flags left
        out)
    """
    problems, aside, groups = [], set(), split_flags(argv)
    while True:
        try:
            args, train_args = parse_args([word for group in groups for word in group])
            return args, train_args, problems, aside
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            wrong = _flags_named(error.problems, groups)
        if not wrong:
            return None, None, problems, aside
        aside |= wrong
        groups = [group for group in groups if flag_of(group) not in wrong]


def _flags_named(problems: list[Problem], groups: list[list[str]]) -> set[str]:
    """The given flags to leave out: the first flag of each problem; if none of these was given, all but `_NEEDED`."""
    given = {flag_of(group) for group in groups}
    wrong = set()
    for problem in problems:
        wrong |= set([name for name in problem.flags if name in given][:1])
    return wrong or given - _NEEDED


def _examine(argv: list[str], processes: int) -> tuple[Examination, dict]:
    """Returns the findings, and the settings and numbers of rows they are about."""
    args, train_args, problems, aside = parse_valid(argv)
    if args is None or aside & _RUN_FLAGS:
        examined = Examination()
        examined.not_examined("rows, template and settings", "the arguments cannot be used")
    else:
        route_library_logs()
        logger.disable(_REPORT_LOGGER)
        try:
            examined = diagnose(args, train_args, aside, processes or world_size())
        finally:
            logger.enable(_REPORT_LOGGER)
    examined.findings[:0] = findings_of(problems)
    before = {"rows": examined.rows, "eval_rows": examined.eval_rows, "set_aside": sorted(aside)}
    return examined, before | {name: None if name in aside else getattr(args, name, None) for name in _SHOWN}


def main(argv: list[str] | None = None) -> int:
    mine, rest = split_own(argv, DoctorArgs)
    setup_logging()
    values, _, problems = read_flags(make_parser([DoctorArgs], "utils.script.doctor", __doc__), mine)
    flags = DoctorArgs(**values)
    if flags.processes < 0:
        problems.append(f"--processes {flags.processes} is not allowed; give 0 or more")
    raise_if_any(problems)
    if flags.write_codes:
        CODES_PAGE.write_text(catalogue(), encoding="utf-8")
        print(f"written: {CODES_PAGE.relative_to(ROOT)}")
        return 0
    with contextlib.redirect_stdout(sys.stderr):  # libraries may print
        examined, before = _examine(rest, flags.processes)
    print(as_json(examined.findings, before) if flags.json else as_text(examined.findings, _line(before)))
    return exit_code(examined.findings)


def _line(before: dict) -> str:
    rows = format_count(before["rows"], "training row")
    line = f"looked at {rows} and {format_count(before['eval_rows'], 'validation row')}"
    aside = ", ".join(f"--{name}" for name in before["set_aside"])
    return line + (f", without {aside}" if aside else "")


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
