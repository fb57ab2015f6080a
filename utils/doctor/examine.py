"""Checks a run before it starts: the quick part for main_train.py, and everything for the command.

`examine` takes well below a second on prepared rows; `diagnose` also checks shapes, all texts and the model's layout.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loguru import logger

from utils.data.load_sources import split_sources
from utils.data.sources import is_mixture
from utils.doctor.census import Census, join, take_census
from utils.doctor.codes import ERROR, WARNING
from utils.doctor.findings import Finding, findings_of, in_order, with_severity
from utils.doctor.resources import disk_findings, memory_findings, quantised_findings
from utils.doctor.rows import census_findings, describe_lengths, problem_findings, report_findings
from utils.doctor.settings import settings_findings
from utils.doctor.template import template_findings
from utils.doctor.tokens import eval_in_train_findings, token_findings
from utils.model.adapter import adapter_of
from utils.model.layout import expected_layout
from utils.model.meta import whole_models, without_weights
from utils.model.quantised import quantisation_of
from utils.model.rope import load_scaled_config
from utils.model.tokenizer import load_run_tokenizer
from utils.runtime.distributed import broadcast_object, world_size
from utils.runtime.errors import Problem, UserError, first_line, in_one_line
from utils.runtime.log import is_main_process
from utils.storage.weights import read_header, weight_files
from utils.template import Template, get_run_template
from utils.template.tokenize import special_token_pattern
from utils.train.plan import steps_of

_QUICK_ROWS = 100_000  # rows whose ids are checked at the start of a run
_MORE_HELP = "python -m utils.script.doctor, with the same flags, says more; --doctor off trains without looking"

_MODEL_FLAGS = {"model_name_or_path", "adapter_name_or_path", "trust_remote_code"}
_READING_FLAGS = {"template_name", "max_len", "max_prompt_length"}


@dataclass
class Examination:
    """The result of `diagnose`.

    Attributes:
        findings: all of them.
        rows: number of rows in the training files; `eval_rows`: in the validation files.
    """

    findings: list[Finding] = field(default_factory=list)
    rows: int = 0
    eval_rows: int = 0

    def not_examined(self, what: str, why: str) -> None:
        self.findings.append(Finding("NOT_EXAMINED", f"{what}: {why}"))


def diagnose(args, train_args, aside: set[str], processes: int) -> Examination:
    """Checks everything that can be checked, whatever else is wrong.

    Args:
        args, train_args: of the run; flags that were refused have their defaults.
        aside: the names of the refused flags.
        processes: how many will train together.
    """
    examined = Examination()
    tokenizer = _examine_model(examined, args, train_args, aside)
    template = _examine_template(examined, args, tokenizer, aside)
    data = _examine_rows(examined, args, train_args, template, tokenizer, aside)
    if tokenizer is None:
        return examined
    quick = quick_findings(args, train_args, data, template, tokenizer, processes)
    # the texts' finding is kept: it also knows validation rows with the same question and another answer
    known = {finding.code for finding in examined.findings} & {"EVAL_IN_TRAIN"}
    examined.findings += [finding for finding in quick if finding.code not in known]
    if not aside & (_MODEL_FLAGS | _READING_FLAGS):
        with whole_models(train_args):
            examined.findings += layout_findings(args, train_args, args.task, tokenizer)
    return examined


def _examine_model(examined: Examination, args, train_args, aside: set[str]):
    """Loads the tokenizer and compares the shapes of the model's weights; returns the tokenizer, or None."""
    if aside & _MODEL_FLAGS:
        examined.not_examined("model, tokenizer, lengths and disk", f"--{min(aside & _MODEL_FLAGS)} cannot be used")
        return None
    tokenizer = _try_check(examined, "the tokens", lambda: load_run_tokenizer(args))
    with whole_models(train_args):
        _try_check(examined, "lengths, disk and memory", lambda: _check_shapes(args))
    return tokenizer


def _examine_template(examined: Examination, args, tokenizer, aside: set[str]):
    """Makes the chat template for the tokenizer; None without one, or if it does not fit."""
    if tokenizer is None or not args.task.uses_template or "template_name" in aside:
        return None
    try:
        return get_run_template(args, tokenizer)
    except UserError as error:
        examined.findings += findings_of(error.problems)
        examined.not_examined("the tokens", "the template does not fit the tokenizer")
        return None


def _examine_rows(examined: Examination, args, train_args, template, tokenizer, aside: set[str]):
    """Prepares the rows and checks their texts; returns the prepared rows, or None."""
    if "train_data_path" in aside:
        examined.not_examined("the rows", "--train_data_path cannot be used")
        return None
    data, stopped = None, []
    if aside & _READING_FLAGS:
        examined.not_examined("the tokens", f"--{min(aside & _READING_FLAGS)} cannot be used")
    elif tokenizer is not None and (template is not None or not args.task.uses_template):
        data, stopped = _prepare_rows(examined, args, train_args, args.task, template, tokenizer)
    _examine_texts(examined, args, data, tokenizer, stopped)
    return data


def layout_findings(args, train_args, task, tokenizer) -> list[Finding]:
    """Checks on a small model of the same kind that rows are computed correctly in the layout of the training."""
    problem, _, reason = expected_layout(args, train_args, task, tokenizer)
    if problem:
        return [Finding("LAYOUT_WRONG", problem)]
    return [Finding("ROWS_PADDED", reason)] if reason else []


def _try_check(examined: Examination, what: str, make):
    """Returns the result of `make`; if it raises `UserError`, adds its problems as findings and returns None."""
    try:
        return make()
    except UserError as error:
        examined.findings += findings_of(error.problems)
        examined.not_examined(what, "see above")
        return None


def _check_shapes(args) -> None:
    """Compares the shapes of the model's weights, by its config.json, with those in its files.

    Raises:
        UserError: the model cannot be built, or the files hold weights of other shapes.
    """
    config = try_load_config(args)
    if config is None:
        return
    model = without_weights(args.model_name_or_path, args.trust_remote_code, config, args.task.auto_class)
    if quantisation_of(args.model_name_or_path) is not None:
        return  # packed weights have other shapes
    expected = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    for file in weight_files(args.model_name_or_path):
        for name, entry in read_header(file)[0].items():
            if expected.get(name, entry["shape"]) != entry["shape"]:
                raise UserError(
                    f"--model_name_or_path {args.model_name_or_path!r} holds {name} as {entry['shape']}, and its "
                    f"config.json asks for {expected[name]}; give the config.json that the weights were saved with"
                )


def _prepare_rows(examined: Examination, args, train_args, task, template, tokenizer) -> tuple[Any, list[Finding]]:
    """Prepares the rows as the training does, without those that would stop it, which become findings.

    Returns:
        (Data, []), or (None, findings) if the rows cannot be prepared.
    """
    overlong = "drop" if args.overlong == "error" else args.overlong
    forgiving = dataclasses.replace(args, on_bad_row="drop", overlong=overlong)
    alone = dataclasses.replace(forgiving, eval_data_path=None, val_size=0.0)
    stopped: list[Finding] = []
    for attempt in (args, forgiving, alone):
        try:
            data = task.load_datasets(attempt, train_args, template, tokenizer)
        except UserError as error:
            stopped = [_preparation_finding(problem) for problem in error.problems]
            continue
        if attempt is alone:
            examined.findings += stopped
        for report in filter(None, (data.checked(), data.eval_report)):
            options = {"args": args, "template": template, "tokenizer": tokenizer}
            examined.findings += report_findings(report, args, functools.partial(describe_lengths, **options))
        return data, []
    return None, stopped


def _preparation_finding(problem: Problem) -> Finding:
    """Makes a finding of a problem that stops the preparation even with `--on_bad_row drop`."""
    return Finding(problem.code, in_one_line(problem), severity=ERROR)


def _examine_texts(examined: Examination, args, data, tokenizer, stopped: list[Finding]) -> None:
    """Checks the texts of all rows; if the rows could not be prepared, also which of them cannot be read."""
    if args.streaming:
        examined.rows = data.checked().rows if data is not None else 0
        what = f"the texts, and all rows but the first {examined.rows:,}"
        examined.not_examined(what, "--streaming true reads them during the training; without it they are examined")
        examined.findings += stopped
        return
    special = _special_text_pattern(args, tokenizer) if tokenizer is not None else None
    options = (args.task, special)
    train = _try_check(examined, "the rows", lambda: _training_census(args, special))
    if train is None:
        return
    held_back = None
    if args.eval_data_path:
        held_back = _try_check(
            examined, "the validation rows", lambda: take_census(args.eval_data_path, "--eval_data_path", *options)
        )
    if data is None:
        unread = [found for part in filter(None, (train, held_back)) for found in problem_findings(part, args)]
        examined.findings += unread or stopped
    elif data.eval is not None and data.eval_report is None:
        train, held_back = _split_by_val_size(train, data)
    examined.rows, examined.eval_rows = _count_rows(train), _count_rows(held_back)
    examined.findings += census_findings(train, held_back)


def _training_census(args, special) -> Census:
    """The census of the training rows, each source of a mixture read with its own columns."""
    parts = [alone for _, alone in split_sources(args)] if is_mixture(args) else [args]
    return join([take_census(part.train_data_path, "--train_data_path", part.task, special) for part in parts])


def _count_rows(census: Census | None) -> int:
    return len(census.sources) + len(census.problems) if census else 0


def _split_by_val_size(census: Census, data) -> tuple[Census, Census]:
    """Splits the census into training rows and rows that `--val_size` holds back."""
    import numpy

    held = {source for row in data.eval["source"] for source in row}
    here = numpy.isin(census.sources, numpy.fromiter(held, numpy.int64, len(held)))
    return census.only(~here), census.only(here)


def _special_text_pattern(args, tokenizer):
    """Returns the pattern of special tokens a content must not have; of plain text that may have them, BOS and EOS."""
    if args.task.uses_template or not args.allow_special_tokens_in_content:
        return special_token_pattern(tokenizer)
    ends = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token and len(token) > 1}
    return re.compile("|".join(map(re.escape, sorted(ends)))) if ends else None


def examine(args, train_args, data, template, tokenizer) -> None:
    """Checks prepared rows and settings before the weights are loaded; warnings go to the log.

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
    # one process checks, since disk and memory differ between machines and all must continue or stop together
    findings = None
    if is_main_process():
        findings = quick_findings(args, train_args, data, template, tokenizer, memory=has_gpu(), rows=_QUICK_ROWS)
    findings = broadcast_object(findings)
    warnings, errors = (in_order(with_severity(findings, severity)) for severity in (WARNING, ERROR))
    for finding in warnings:
        logger.warning("doctor: {}\n  → {}", finding.line(), finding.remedy)
    if errors:
        problems = [f"{finding.line()}\n     → {finding.remedy}" for finding in errors]
        problems[-1] += f"\n   {_MORE_HELP}"
        raise UserError(*problems)
    if warnings:
        logger.info(_MORE_HELP)


def has_gpu() -> bool:
    """Whether a GPU is there, for which the memory estimate is worth half a second at the start."""
    import torch

    return torch.cuda.is_available()


def quick_findings(
    args,
    train_args,
    data,
    template,
    tokenizer,
    processes: int | None = None,
    memory: bool = True,
    rows: int | None = None,
) -> list[Finding]:
    """Runs the checks that take well below a second: settings, template, disk, memory, and the prepared ids as arrays.

    Args:
        args, train_args, data, template, tokenizer: as for `examine`; data and template may be None.
        processes: how many will train together; None for as many as run now.
        memory: whether to estimate it.
        rows: how many of the first training and validation rows to check; None for all.
    """
    processes = processes or world_size()
    seen = data if data is None or rows is None else _first_rows(data, rows)
    checks = {
        "the settings": lambda: settings_findings(args, train_args, try_load_config(args), data, seen, processes),
    }
    if adapter_of(args).quantised:
        checks["the weights in 4 bits"] = lambda: quantised_findings(args, train_args)
    if memory:
        checks["memory"] = lambda: memory_findings(args, train_args, processes)
    if template is not None:
        checks["the template"] = lambda: template_findings(template, tokenizer)
    if data is not None:
        steps = steps_of(train_args, data.rows_in_epoch(), processes)
        checks["the disk"] = lambda: disk_findings(args, train_args, steps)
        checks["the tokens"] = lambda: prepared_rows_findings(args, seen, template, tokenizer)
        if data.eval is not None:
            checks["the validation rows"] = lambda: eval_in_train_findings(data, rows, args.task.row_type)
    with whole_models(train_args):
        return [finding for name, check in checks.items() for finding in _run_check(name, check)]


def _first_rows(data, rows: int):
    """Returns the first rows, since checking all of a large dataset would read it into memory."""
    from datasets import Dataset

    parts = {name: getattr(data, name) for name in ("train", "eval")}
    first = {name: Dataset(part.data.slice(0, rows)) for name, part in parts.items() if part is not None}
    return dataclasses.replace(data, **first)


def _run_check(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Runs a check; an error in it becomes a note, so that an unforeseen model does not stop the training."""
    try:
        return check()
    except Exception as error:
        logger.debug("doctor: {} could not be looked at: {!r}", name, error)
        return [Finding("NOT_EXAMINED", f"{name}: {first_line(error, 400)}")]


def prepared_rows_findings(args, data, template, tokenizer) -> list[Finding]:
    """Checks the ids of training rows, and of validation rows with files of their own."""
    stop = template.stop_token() if template is not None else None
    call_stop = template.call_stop if isinstance(template, Template) else ""
    findings = token_findings(data.train, data.checked(), args, tokenizer, stop, call_stop)
    if data.eval_report is not None:
        codes = {finding.code for finding in findings}
        found = token_findings(data.eval, data.eval_report, args, tokenizer, stop, call_stop)
        findings += [finding for finding in found if finding.code not in codes]
    return findings


def try_load_config(args):
    """Loads the model's configuration; None if that fails, which loading the model reports better."""
    try:
        return load_scaled_config(args.model_name_or_path, args.rope_scaling, args.trust_remote_code)
    except UserError:
        return None
