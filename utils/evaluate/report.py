"""What an evaluation leaves: a table, every row with its scores, and a summary of both."""

import importlib.metadata
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from utils.evaluate.metrics import Figure, signatures
from utils.evaluate.models import EvalModel
from utils.runtime.errors import Problem, UserError, is_disk_error
from utils.runtime.text import markdown_table
from utils.storage.files import write_refusal, write_text

# module → package
_PACKAGES = {"torch": "torch", "transformers": "transformers", "peft": "peft", "sacrebleu": "sacrebleu",
             "rouge_score": "rouge-score"}  # fmt: skip


def summary_of(output: Path) -> Path:
    """`eval.jsonl` → `eval.summary.json`"""
    return output.with_suffix(".summary.json")


def check_output(path: str | None, overwrite: bool, read: list[str]) -> list[str]:
    """The problems of the file that the rows are to be written into.

    Args:
        path: its `--output`.
        overwrite: whether it may exist.
        read: the files that rows are read from.
    """
    if not path:
        return ["--output is missing; give a .jsonl file for the rows with their scores"]
    flag, output = f"--output {path!r}", Path(path)
    if output.suffix != ".jsonl":
        return [f"{flag} is not a .jsonl file, and it will be one; give such a name"]
    if output.resolve() in [Path(file).resolve() for file in read]:
        return [f"{flag} is one of the files of --eval_data_path; give another file"]
    for one in (output, summary_of(output)):
        if one.is_dir():
            return [f"{flag}: {str(one)!r} is a folder; give another file"]
        if one.exists() and not overwrite:
            return [f"{flag}: {str(one)!r} exists; give another file, or --overwrite true to replace it"]
    if reason := write_refusal(output.parent):
        return [f"{flag} cannot be written: {reason}; give another file"]
    return []


def table(figures: dict[str, list[Figure]]) -> str:
    """The figures side by side, as a Markdown table.

    Args:
        figures: of each model by its name; the same ones for each.
    """

    def told(figure: Figure) -> str:
        return f"{figure.value:.2f}" + ("" if figure.error is None else f" ± {figure.error:.2f}")

    names = list(figures)
    header = ["0 to 100", "n", *names] + (["difference"] if len(names) == 2 else [])
    rows = []
    for same in zip(*figures.values(), strict=True):
        row = [same[0].label, f"{same[0].rows:,}", *map(told, same)]
        rows.append(row + ([f"{same[1].value - same[0].value:+.2f}"] if len(names) == 2 else []))
    return markdown_table(header, rows, aligned=True)


def write(path: str, lines: list[dict], summary: dict) -> None:
    """Writes rows and summary, each whole or not at all.

    Raises:
        UserError: the disk is full, or refuses.
    """
    output = Path(path)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    told = json.dumps(summary, ensure_ascii=False, indent=2) + "\n"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for file, content in ((output, text), (summary_of(output), told)):
            write_text(file, content)
    except OSError as error:
        what = "the disk is full" if is_disk_error(error) and error.errno == 28 else error.strerror
        raise UserError(f"--output {path!r} cannot be written: {what}; make room, or give another file") from error


def summarise(
    args: Any,
    task: Any,
    eval_models: list[EvalModel],
    figures: dict[str, list[Figure]],
    rows: int,
    problems: list[Problem],
) -> dict:
    """What is written beside the rows.

    Args:
        args: the flags, a dataclass.
        task: the way of assessing.
        eval_models: the models.
        figures: of each model by its name.
        rows: how many were evaluated.
        problems: why each other row was not.
    """
    return {
        "task": task.name,
        "rows": rows,
        "skipped": [str(problem) for problem in problems],
        "figures": {
            name: {
                one.key: {"value": round(one.value, 4), "rows": one.rows}
                | ({} if one.error is None else {"standard_error": round(one.error, 4)})
                for one in found
            }
            for name, found in figures.items()
        },
        "models": {one.name: {"base": one.parts.base, "adapters": list(one.parts.adapters)} for one in eval_models},
        "sacrebleu": signatures(task.metrics) if task.name == "generation" else {},
        "arguments": asdict(args),
        "versions": {
            package: importlib.metadata.version(package)
            for module, package in _PACKAGES.items()
            if importlib.util.find_spec(module)
        },
    }
