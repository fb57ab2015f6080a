"""The whole examination: arguments, model, rows and their texts, whatever else is wrong."""

import dataclasses
import functools
import re
from dataclasses import dataclass, field
from typing import Any

from utils.doctor.census import Census, take_census
from utils.doctor.codes import ERROR
from utils.doctor.findings import Finding, findings_of
from utils.doctor.lengths import measured
from utils.doctor.quick import config_of, quick_findings
from utils.doctor.rows import census_findings, problem_findings, report_findings
from utils.model.layout import expected_layout
from utils.model.meta import whole_models, without_weights
from utils.model.quantised import quantisation_of
from utils.model.tokenizer import tokenizer_of
from utils.runtime.errors import Problem, UserError, in_one_line
from utils.storage.weights import read_header, weight_files
from utils.tasks import get_task
from utils.template import get_template
from utils.template.tokenize import special_token_pattern

_MODEL_FLAGS = {"model_name_or_path", "adapter_name_or_path", "trust_remote_code"}
_READING_FLAGS = {"template_name", "max_len", "max_prompt_length"}


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
        with whole_models(train_args):
            _attempt(examined, "lengths, disk and memory", lambda: _check_model(args))
    if tokenizer is not None and task.USES_TEMPLATE and "template_name" not in aside:
        try:
            template = get_template(args.template_name, tokenizer, args.template_date)
        except UserError as error:
            found += findings_of(error.problems)
            examined.not_examined("the tokens", "the template does not fit the tokenizer")
    readable = tokenizer is not None and (template is not None or not task.USES_TEMPLATE)
    if "train_data_path" in aside:
        examined.not_examined("the rows", "--train_data_path cannot be used")
    else:
        stopped: list[Finding] = []
        if aside & _READING_FLAGS:
            examined.not_examined("the tokens", f"--{min(aside & _READING_FLAGS)} cannot be used")
        elif readable:
            data, stopped = _prepare(examined, args, train_args, task, template, tokenizer)
        _census(examined, args, data, tokenizer, stopped)
    if tokenizer is not None:
        quick = quick_findings(args, train_args, data, template, tokenizer, processes)
        # of the census, which also knows rows that are asked alike
        known = {finding.code for finding in found} & {"EVAL_IN_TRAIN"}
        found += [finding for finding in quick if finding.code not in known]
    if tokenizer is not None and not aside & (_MODEL_FLAGS | _READING_FLAGS):
        with whole_models(train_args):
            found += layout_findings(args, train_args, task, tokenizer)
    return examined


def layout_findings(args, train_args, task, tokenizer) -> list[Finding]:
    """Whether the model computes rows in the layout they will be trained in, tried on a small one of its kind."""
    problem, _, reason = expected_layout(args, train_args, task, tokenizer)
    if problem:
        return [Finding("LAYOUT_WRONG", problem)]
    return [Finding("ROWS_PADDED", reason)] if reason else []


def _attempt(examined: Examined, what: str, make):
    """What `make` makes; None, and findings, where it refuses."""
    try:
        return make()
    except UserError as error:
        examined.findings += findings_of(error.problems)
        examined.not_examined(what, "see above")
        return None


def _check_model(args) -> None:
    """Builds the model of a readable config.json, without its weights, and compares shapes with what the files hold.

    Raises:
        UserError: it cannot be built, or the files hold weights of other shapes.
    """
    config = config_of(args)
    if config is None:
        return
    model = without_weights(args.model_name_or_path, args.trust_remote_code, config)
    if quantisation_of(args.model_name_or_path) is not None:
        return  # packed weights have other shapes
    asked = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    for file in weight_files(args.model_name_or_path):
        for name, entry in read_header(file)[0].items():
            if asked.get(name, entry["shape"]) != entry["shape"]:
                raise UserError(
                    f"--model_name_or_path {args.model_name_or_path!r} holds {name} as {entry['shape']}, and its "
                    f"config.json asks for {asked[name]}; give the config.json that the weights were saved with"
                )


def _prepare(examined: Examined, args, train_args, task, template, tokenizer) -> tuple[Any, list[Finding]]:
    """The rows as the training prepares them; those that stop it are left out here, and told.

    Returns:
        Data, or None where none can be had, and then why.
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
        for report in filter(None, (data.report, data.eval_report)):
            options = {"args": args, "template": template, "tokenizer": tokenizer}
            examined.findings += report_findings(report, args, functools.partial(measured, **options))
        return data, []
    return None, stopped


def _preparation_finding(problem: Problem) -> Finding:
    """What stops the preparation even where bad rows are left out, in one line."""
    return Finding(problem.code, in_one_line(problem), severity=ERROR)


def _census(examined: Examined, args, data, tokenizer, stopped: list[Finding]) -> None:
    """The rows' texts, and the rows themselves where there is no preparation to tell of them."""
    special = _forbidden(args, tokenizer) if tokenizer is not None else None
    options = (args.task_type.partition("_")[0], special)
    train = _attempt(examined, "the rows", lambda: take_census(args.train_data_path, "--train_data_path", *options))
    if train is None:
        return
    held_back = None
    if args.eval_data_path:
        held_back = _attempt(
            examined, "the validation rows", lambda: take_census(args.eval_data_path, "--eval_data_path", *options)
        )
    examined.rows = len(train.sources) + len(train.problems)
    examined.eval_rows = len(held_back.sources) + len(held_back.problems) if held_back else 0
    if data is None:
        unread = [found for part in filter(None, (train, held_back)) for found in problem_findings(part, args)]
        examined.findings += unread or stopped
    elif data.eval is not None and data.eval_report is None:
        train, held_back = _parted(train, data)
    examined.findings += census_findings(train, held_back)


def _parted(census: Census, data) -> tuple[Census, Census]:
    """The census of rows of which `--val_size` holds some back, as two."""
    import numpy

    held = {source for row in data.eval["source"] for source in row}
    here = numpy.isin(census.sources, numpy.fromiter(held, numpy.int64, len(held)))
    return census.only(~here), census.only(here)


def _forbidden(args, tokenizer):
    """What is not to stand in a content: where it may be the token, only what begins and ends a plain text."""
    if get_task(args.task_type).USES_TEMPLATE or not args.allow_special_tokens_in_content:
        return special_token_pattern(tokenizer)
    ends = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token and len(token) > 1}
    return re.compile("|".join(map(re.escape, sorted(ends)))) if ends else None
