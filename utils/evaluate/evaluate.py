"""Evaluates models on the rows of files and writes scores and summary."""

import gc
from dataclasses import dataclass
from typing import Literal

from loguru import logger

from utils.config.flags import arg
from utils.data.columns import COLUMNS_HELP, parse_columns
from utils.evaluate.methods import Generation, MultipleChoice, read_task
from utils.evaluate.metrics import METRICS
from utils.evaluate.models import EvalModel, load_eval_models
from utils.evaluate.report import summarise, table, write
from utils.infer.generate import GenerateArgs
from utils.infer.load import Parts, TrainedArgs
from utils.runtime.errors import Problem, UserError, raise_if_any

_MAX_LINES_SHOWN = 100  # of rows that cannot be evaluated


@dataclass
class EvaluateArgs(GenerateArgs, TrainedArgs):
    """Flags of evaluate."""

    eval_data_path: str | None = arg(
        None, "Rows with answers: .jsonl, .json, .csv, .parquet, .arrow, a folder, a glob; separated by commas."
    )
    columns: str | None = arg(None, COLUMNS_HELP)
    output: str | None = arg(None, "The .jsonl file for every row with answers and scores.")
    overwrite: bool = arg(False, "Replace --output and its summary.")
    compare_base: bool = arg(True, "Also evaluate the model that the training started from, if it is known.")
    max_rows: int | None = arg(None, "Evaluate only the first rows, at most so many. Default: all.")
    batch_size: int = arg(16, "The largest number of prompts, or of choices, computed at once.")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "The dtype of the weights; auto: as they are saved.")
    metrics: str = arg(",".join(METRICS), "The scores of generated answers, separated by commas.")
    choice_form: Literal["text", "letter"] = arg(
        "text",
        "For rows with choices. text: compare the likelihood of each choice's text after the question; letter: list "
        "the choices in the question and compare the likelihood of their letters.",
    )


def make_task(args: EvaluateArgs, kind: str, metrics: list[str], given: set[str]):
    """The method of evaluation for a kind of rows.

    Args:
        args: the flags.
        kind: `generation` or `choices`, from `read_task`.
        metrics: names of `utils.evaluate.metrics.METRICS`.
        given: names of the flags on the command line.

    Raises:
        UserError: a flag of the other method was given.
    """
    others = {"generation": {"choice_form"}, "choices": {*GenerateArgs.__dataclass_fields__, "metrics"}}[kind]
    what = {"generation": "rows to answer in words", "choices": "rows with choices"}[kind]
    raise_if_any(
        f"--{name} {getattr(args, name)} has no effect on {what}, which --eval_data_path {args.eval_data_path!r} has; "
        "leave it out"
        for name in sorted(others & given)
    )
    return Generation(args, metrics) if kind == "generation" else MultipleChoice(args.choice_form)


def encode_rows(task, eval_models: list[EvalModel], rows: list, problems: list[Problem]) -> dict[str, dict[int, list]]:
    """Encodes each row for each model: model name → number of the row → encoded row.

    A row that cannot be encoded for one of the models is left out for all; its problem goes to `problems`.
    """
    encoded: dict[str, dict[int, list]] = {eval_model.name: {} for eval_model in eval_models}
    for number, row in enumerate(rows):
        try:
            found = [task.encode(eval_model, row) for eval_model in eval_models]
        except UserError as error:
            message = f"{row.file}:{row.line} {error.problems[0]}"
            problems.append(Problem(message, file=row.file, line=row.line))
            continue
        for name, ids in zip(encoded, found, strict=True):
            encoded[name][number] = ids
    return encoded


def _report_bad_rows(args: EvaluateArgs, problems: list[Problem], kept: int) -> None:
    """Logs the rows that cannot be evaluated, or refuses them if no row is left."""
    shown = "".join(f"\n  {problem}" for problem in problems[:_MAX_LINES_SHOWN])
    shown += f"\n  … and {len(problems) - _MAX_LINES_SHOWN:,} more" if len(problems) > _MAX_LINES_SHOWN else ""
    if not kept:
        raise UserError(
            f"no row of --eval_data_path {args.eval_data_path!r} can be evaluated:{shown or ' it has none'}"
        )
    if problems:
        logger.warning("{:,} rows cannot be evaluated and are skipped:{}", len(problems), shown)


def answer_with(task, eval_model: EvalModel, encoded: dict[int, list], args: EvaluateArgs) -> dict[int, object]:
    """Loads a model, answers the rows, and frees its memory; returns number of the row → answer, in their order."""
    import torch
    from tqdm import tqdm

    model = eval_model.load(args.dtype)
    with tqdm(total=len(encoded), unit="row", desc=eval_model.name) as bar:
        answers = {}
        for number, answer in task.answer(model, eval_model, encoded, args.batch_size):
            answers[number] = answer
            bar.update()
    del model
    gc.collect()
    torch.cuda.empty_cache()  # the next model needs the room
    return {number: answers[number] for number in encoded}


def evaluate(args: EvaluateArgs, models: dict[str, Parts], metrics: list[str], given: set[str]) -> None:
    """Evaluates the models on the rows, prints the table, and writes rows and summary.

    Args:
        args: the flags.
        models: name → base and adapters, from `check_eval_models`.
        metrics: names of `utils.evaluate.metrics.METRICS`.
        given: names of the flags on the command line.
    """
    kind, rows, problems = read_task(args.eval_data_path, "--eval_data_path", parse_columns(args.columns)[0])
    task = make_task(args, kind, metrics, given)
    rows = rows[: args.max_rows]
    eval_models = load_eval_models(args, models)
    encoded = encode_rows(task, eval_models, rows, problems)
    kept = list(encoded[eval_models[0].name])
    _report_bad_rows(args, problems, len(kept))

    answers = {model.name: answer_with(task, model, encoded[model.name], args) for model in eval_models}
    scores = {
        name: {number: task.score(rows[number], found[number]) for number in kept} for name, found in answers.items()
    }
    evaluated = [rows[number] for number in kept]
    figures = {
        name: task.figures(evaluated, list(answers[name].values()), list(scores[name].values())) for name in answers
    }
    print(table(figures))
    lines = [
        task.output_row(rows[number], *({name: of[name][number] for name in of} for of in (answers, scores)))
        for number in kept
    ]
    write(args.output, lines, summarise(args, task, eval_models, figures, len(kept), problems))
    skipped = f", {len(problems):,} skipped and listed above" if problems else ""
    logger.info("{:,} rows evaluated{}: {}", len(kept), skipped, args.output)
