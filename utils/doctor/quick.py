"""One verdict before a GPU is touched: the quick part, which main_train.py runs on prepared rows."""

import dataclasses
from collections.abc import Callable

from loguru import logger

from utils.doctor.codes import ERROR, WARNING
from utils.doctor.findings import Finding, in_order, with_severity
from utils.doctor.quantised import quantised_findings
from utils.doctor.resources import disk_findings, memory_findings
from utils.doctor.settings import settings_findings, steps_of
from utils.doctor.template import template_findings
from utils.doctor.tokens import repeated, token_findings
from utils.model.adapter import ADAPTERS
from utils.model.meta import whole_models
from utils.runtime.distributed import broadcast_object, world_size
from utils.runtime.errors import UserError, first_line
from utils.runtime.log import is_main_process


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
    findings = None
    if is_main_process():
        findings = quick_findings(args, train_args, data, template, tokenizer, memory=has_gpu(), rows=_QUICK_ROWS)
    findings = broadcast_object(findings)
    warnings, errors = (in_order(with_severity(findings, severity)) for severity in (WARNING, ERROR))
    for finding in warnings:
        logger.warning("doctor: {}", finding.line())
    if errors:
        problems = [f"{finding.line()}\n     → {finding.remedy}" for finding in errors]
        problems[-1] += f"\n   {_SAYS_MORE}"
        raise UserError(*problems)
    if warnings:
        logger.info(_SAYS_MORE)


_QUICK_ROWS = 100_000
_SAYS_MORE = "python -m utils.script.doctor, with the same flags, says more; --doctor off trains without looking"


def has_gpu() -> bool:
    """Whether an estimate of the memory is worth its half second at the start of a run."""
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
    """What takes well below a second: settings, template, disk, memory, and the prepared ids as arrays.

    Args:
        args, train_args, data, template, tokenizer: as for `examine`; data and template may be None.
        processes: how many will train together; None for those that run.
        memory: whether to estimate it.
        rows: whose ids are looked at, the first of the training and of the validation rows; None for all.
    """
    processes = processes or world_size()
    seen = data if data is None or rows is None else _beginning(data, rows)
    checks = {
        "the settings": lambda: settings_findings(args, train_args, config_of(args), data, seen, processes),
    }
    if ADAPTERS[args.train_mode].quantised:
        checks["the weights in 4 bits"] = lambda: quantised_findings(args, train_args)
    if memory:
        checks["memory"] = lambda: memory_findings(args, train_args, processes)
    if template is not None:
        checks["the template"] = lambda: template_findings(template, tokenizer)
    if data is not None:
        steps = steps_of(train_args, len(data.train), processes)
        checks["the disk"] = lambda: disk_findings(args, train_args, steps)
        checks["the tokens"] = lambda: rows_findings(args, seen, template, tokenizer)
        if data.eval is not None:
            checks["the validation rows"] = lambda: repeated(data, rows)
    with whole_models(train_args):
        return [finding for name, check in checks.items() for finding in _whatever_happens(name, check)]


def _beginning(data, rows: int):
    """The first rows: all of them would be read into memory, however many there are."""
    from datasets import Dataset

    parts = {name: getattr(data, name) for name in ("train", "eval")}
    first = {name: Dataset(part.data.slice(0, rows)) for name, part in parts.items() if part is not None}
    return dataclasses.replace(data, **first)


def _whatever_happens(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """A model or a tokenizer that a check was not written for must not stop the training that it would allow."""
    try:
        return check()
    except Exception as error:
        logger.debug("doctor: {} could not be looked at: {!r}", name, error)
        return [Finding("NOT_EXAMINED", f"{name}: {first_line(error, 400)}")]


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
