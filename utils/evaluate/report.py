"""Formats and writes the results of an evaluation: a table, all rows with their scores, and a summary."""

import importlib.metadata
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from utils.evaluate.metrics import Figure, signatures
from utils.evaluate.models import EvalModel
from utils.model.source import given_model
from utils.runtime.errors import Problem, UserError, is_disk_error
from utils.runtime.text import markdown_table
from utils.storage.files import is_one_of, write_refusal, write_text

# module → package
_PACKAGES = {"torch": "torch", "transformers": "transformers", "peft": "peft", "sacrebleu": "sacrebleu",
             "rouge_score": "rouge-score"}  # fmt: skip


def summary_of(output: Path) -> Path:
    """`eval.jsonl` → `eval.summary.json`"""
    return output.with_suffix(".summary.json")


def check_output(path: str | None, overwrite: bool, read: list[str]) -> list[str]:
    """The problems of `--output`, the file for the rows with their scores.

    Args:
        path: its value.
        overwrite: whether it may be replaced.
        read: the files that rows are read from.
    """
    if not path:
        return ["--output is missing; give a .jsonl file for the rows with their scores"]
    flag, output = f"--output {path!r}", Path(path)
    if output.suffix != ".jsonl":
        return [f"{flag} does not end in .jsonl, the format it is written in; give such a name"]
    for file in (output, summary_of(output)):
        if is_one_of(file, read):
            return [f"{flag}: {str(file)!r} is one of the files of --eval_data_path; give another file"]
        if file.is_dir():
            return [f"{flag}: {str(file)!r} is a folder; give another file"]
        if file.exists() and not overwrite:
            return [f"{flag}: {str(file)!r} exists; give another file, or --overwrite true to replace it"]
    if reason := write_refusal(output.parent):
        return [f"{flag} cannot be written: {reason}; give another file"]
    return []


def table(figures: dict[str, list[Figure]]) -> str:
    """The figures side by side, as a Markdown table.

    Args:
        figures: name of the model → its figures, the same ones for each.
    """

    def text(figure: Figure) -> str:
        return f"{figure.value:.2f}" + ("" if figure.error is None else f" ± {figure.error:.2f}")

    names = list(figures)
    header = ["0 to 100", "n", *names] + (["difference"] if len(names) == 2 else [])
    rows = []
    for same in zip(*figures.values(), strict=True):
        row = [same[0].label, f"{same[0].rows:,}", *map(text, same)]
        rows.append(row + ([f"{same[1].value - same[0].value:+.2f}"] if len(names) == 2 else []))
    return markdown_table(header, rows, aligned=True)


def write(path: str, lines: list[dict], summary: dict) -> None:
    """Writes rows and summary, each by an atomic rename.

    Raises:
        UserError: the disk is full or not writable.
    """
    output = Path(path)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    summary_text = json.dumps(summary, ensure_ascii=False, indent=2) + "\n"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for file, content in ((output, text), (summary_of(output), summary_text)):
            write_text(file, content)
    except OSError as error:
        what = "the disk is full" if is_disk_error(error) and error.errno == 28 else error.strerror
        raise UserError(
            f"--output {path!r} cannot be written: {what}; free some space, or give another file"
        ) from error


def summarise(
    args: Any,
    task: Any,
    eval_models: list[EvalModel],
    figures: dict[str, list[Figure]],
    rows: int,
    problems: list[Problem],
) -> dict:
    """The content of the summary file.

    Args:
        args: the flags, a dataclass.
        task: the method of evaluation.
        eval_models: the models.
        figures: name of the model → its figures.
        rows: how many were evaluated.
        problems: of the rows that were not.
    """
    return {
        "task": task.name,
        "rows": rows,
        "skipped": [str(problem) for problem in problems],
        "figures": {name: {figure.key: _rounded(figure) for figure in found} for name, found in figures.items()},
        "models": {
            model.name: {"base": given_model(model.parts.base), "adapters": list(model.parts.adapters)}
            for model in eval_models
        },
        "sacrebleu": signatures(task.metrics) if task.name == "generation" else {},
        "arguments": asdict(args),
        "versions": {
            package: importlib.metadata.version(package)
            for module, package in _PACKAGES.items()
            if importlib.util.find_spec(module)
        },
    }


def _rounded(figure: Figure) -> dict:
    error = {} if figure.error is None else {"standard_error": round(figure.error, 4)}
    return {"value": round(figure.value, 4), "rows": figure.rows, **error}
