"""One verdict before a GPU is touched: the quick part that main_train.py runs, and the whole."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from loguru import logger

from utils.doctor_census import Census, take_census
from utils.doctor_rows import census_findings, problem_findings, report_findings
from utils.doctor_settings import settings_findings, steps_of
from utils.doctor_sizes import disk_findings, memory_findings
from utils.doctor_template import template_findings
from utils.doctor_tokens import token_findings
from utils.errors import UserError
from utils.finding_codes import ERROR, WARNING
from utils.findings import Finding, in_order, with_severity
from utils.launch import agree, world_size
from utils.log import is_main_process
from utils.segments import special_pattern
from utils.tasks import get_task
from utils.template import get_template
from utils.tokenizer import tokenizer_of

_MODEL_FLAGS = {"model_name_or_path", "adapter_name_or_path", "trust_remote_code"}
_READING_FLAGS = {"template_name", "max_len", "max_prompt_length", "task_type", "train_args_path"}


# ------------------------------------------------------------------ the quick part


def examine(args, train_args, data, template, tokenizer) -> None:
    """Looks at prepared rows and settings before the weights are loaded; warnings go to the log.

    Args:
        args, train_args: of the run.
        data: of the task's `load_datasets`.
        template: the chat template; None for plain text.
        tokenizer: the run's.

    Raises:
        UserError: with every error found.
    """
    if args.doctor == "off":
        return
    # one process looks: disk and memory differ between them, and all must go on or stop
    findings = quick_findings(args, train_args, data, template, tokenizer) if is_main_process() else None
    findings = agree(findings)
    warnings, errors = (in_order(with_severity(findings, severity)) for severity in (WARNING, ERROR))
    for finding in warnings:
        logger.warning("doctor: {}", finding.line())
    if errors:
        problems = [f"{finding.line()}\n     → {finding.remedy}" for finding in errors]
        problems[-1] += f"\n   {_SAYS_MORE}"
        raise UserError(*problems)
    if warnings:
        logger.info(_SAYS_MORE)


_SAYS_MORE = "python -m utils.script.doctor, with the same flags, says more; --doctor off trains without looking"


def quick_findings(args, train_args, data, template, tokenizer, processes: int | None = None) -> list[Finding]:
    """What takes well below a second: settings, template, disk, memory, and the prepared ids as arrays."""
    processes = processes or world_size()
    findings = settings_findings(args, train_args, config_of(args), data, processes)
    findings += memory_findings(args, train_args, processes)
    if template is not None:
        findings += template_findings(template, tokenizer)
    if data is not None:
        findings += disk_findings(args, train_args, steps_of(train_args, len(data.train), processes))
        findings += rows_findings(args, data, template, tokenizer)
    return findings


def rows_findings(args, data, template, tokenizer) -> list[Finding]:
    """The ids of the training rows, and of validation rows with files of their own."""
    stop = template.stop_token() if template is not None else None
    findings = token_findings(data.train, data.report.files, args, tokenizer, stop)
    if data.eval_report is not None:
        codes = {finding.code for finding in findings}
        found = token_findings(data.eval, data.eval_report.files, args, tokenizer, stop)
        findings += [finding for finding in found if finding.code not in codes]
    return findings


def config_of(args):
    """The model's configuration; None where it cannot be read, which loading the model says better."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    except Exception:  # each model's code raises its own
        return None


# ------------------------------------------------------------------ the whole


@dataclass
class Examined:
    """What the whole examination had before it, and found.

    Attributes:
        findings: all of them.
        rows: of the training files; `eval_rows` of the validation files.
    """

    findings: list[Finding] = field(default_factory=list)
    rows: int = 0
    eval_rows: int = 0

    def not_examined(self, what: str, why: str) -> None:
        self.findings.append(Finding("NOT_EXAMINED", f"{what}: {why}"))


def diagnose(args, train_args, aside: set[str], processes: int) -> Examined:
    """Looks at everything that can be looked at, whatever else is wrong.

    Args:
        args, train_args: of the run, those flags left at their defaults that were refused.
        aside: the names of these flags.
        processes: how many will train together.
    """
    examined = Examined()
    found = examined.findings
    data = template = tokenizer = None
    task = get_task(args.task_type)
    if aside & _MODEL_FLAGS:
        examined.not_examined("model, tokenizer, lengths and disk", f"--{min(aside & _MODEL_FLAGS)} cannot be used")
    else:
        tokenizer = _attempt(examined, "the tokens", lambda: tokenizer_of(args))
    if tokenizer is not None and task.USES_TEMPLATE and "template_name" not in aside:
        try:
            template = get_template(args.template_name, tokenizer)
        except UserError as error:
            code = "TEMPLATE_TOKEN_SPLIT" if "must be one token" in str(error) else "ARGUMENTS"
            found += [Finding(code, problem) for problem in error.problems]
    readable = tokenizer is not None and (template is not None or not task.USES_TEMPLATE)
    if "train_data_path" in aside:
        examined.not_examined("the rows", "--train_data_path cannot be used")
    else:
        if aside & _READING_FLAGS:
            examined.not_examined("the tokens", f"--{min(aside & _READING_FLAGS)} cannot be used")
        elif readable:
            data = _prepare(examined, args, train_args, task, template, tokenizer)
        _census(examined, args, data, tokenizer, aside)
    if tokenizer is not None:
        found += quick_findings(args, train_args, data, template, tokenizer, processes)
    return examined


def _attempt(examined: Examined, what: str, make):
    """What `make` makes; None, and findings, where it refuses."""
    try:
        return make()
    except UserError as error:
        examined.findings += [Finding("ARGUMENTS", problem) for problem in error.problems]
        examined.not_examined(what, "see above")
        return None


def _prepare(examined: Examined, args, train_args, task, template, tokenizer) -> Any:
    """The rows as the training prepares them; those that stop it are left out here, and told.

    Returns:
        Data, or None where none can be had.
    """
    overlong = "drop" if args.overlong == "error" else args.overlong
    forgiving = dataclasses.replace(args, on_bad_row="drop", overlong=overlong)
    alone = dataclasses.replace(forgiving, eval_data_path=None, val_size=0.0)
    problems: list[str] = []
    for attempt in (args, forgiving, alone):
        try:
            data = task.load_datasets(attempt, train_args, template, tokenizer)
        except UserError as error:
            problems = error.problems
            continue
        if attempt is alone:
            examined.findings += map(_preparation_finding, problems)
        examined.findings += report_findings(data.report, args)
        examined.findings += report_findings(data.eval_report, args) if data.eval_report else []
        return data
    examined.findings += map(_preparation_finding, problems)
    return None


def _preparation_finding(problem: str) -> Finding:
    """What stops the preparation even where bad rows are left out."""
    problem = " ".join(problem.split())
    if "keeps a trained token" in problem or "holds no row" in problem:
        return Finding("ROW_NOTHING_TRAINED", problem, severity=ERROR)
    return Finding("ROW_UNREADABLE" if "cannot be used:" in problem else "ARGUMENTS", problem)


def _census(examined: Examined, args, data, tokenizer, aside: set[str]) -> None:
    """The rows' texts."""
    special = _forbidden(args, tokenizer) if tokenizer is not None else None
    options = (args.task_type.partition("_")[0], special)
    train = _attempt(examined, "the rows", lambda: take_census(args.train_data_path, "--train_data_path", *options))
    if train is None:
        return
    held_back = None
    if args.eval_data_path and "eval_data_path" not in aside:
        held_back = _attempt(
            examined, "the validation rows", lambda: take_census(args.eval_data_path, "--eval_data_path", *options)
        )
    examined.rows = len(train.sources) + len(train.problems)
    examined.eval_rows = len(held_back.sources) + len(held_back.problems) if held_back else 0
    if not any(finding.code.startswith("ROW_") for finding in examined.findings) and data is None:
        for census in filter(None, (train, held_back)):
            examined.findings += problem_findings(census, args)
    if data is not None and data.eval is not None and data.eval_report is None:
        train, held_back = _parted(train, data)
    examined.findings += census_findings(train, held_back)


def _parted(census: Census, data) -> tuple[Census, Census]:
    """The census of rows of which `--val_size` holds some back, as two."""
    import numpy

    held = {source for row in data.eval["source"] for source in row}
    here = numpy.isin(census.sources, numpy.fromiter(held, numpy.int64, len(held)))
    return census.only(~here), census.only(here)


def _forbidden(args, tokenizer):
    """What must not stand in a content: of plain text only what begins and ends one, since chat text is written so."""
    if get_task(args.task_type).USES_TEMPLATE:
        return special_pattern(tokenizer)
    import re

    ends = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token and len(token) > 1}
    return re.compile("|".join(map(re.escape, sorted(ends)))) if ends else None
