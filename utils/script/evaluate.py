"""Evaluates a trained model on rows with answers, and its base beside it.

python -m utils.script.evaluate --model_path output/sft-20260101-120000 --eval_data_path data/sft_eval_data.jsonl \\
    --output eval.jsonl

Rows of any form that is trained on are answered, and each answer is compared with the row's: exact match, BLEU, chrF
and ROUGE-L, Chinese by character. Rows {"question", "choices", "answer"} are scored by the likelihood of each choice.
A file has rows of one kind. The table goes to stdout, every row with answers and scores to --output, the table with
all settings to <output>.summary.json.
"""

import gc
from dataclasses import dataclass
from typing import Literal

from loguru import logger

from utils.config.flags import arg, make_parser, read_flags
from utils.data.files import files_left_out, find_files
from utils.evaluate.methods import Generation, MultipleChoice, read_task
from utils.evaluate.metrics import METRICS, check_metrics
from utils.evaluate.models import EvalModel, check_eval_models, load_eval_models
from utils.evaluate.report import check_output, summarise, table, write
from utils.infer.generate import GenerateArgs, check_generate
from utils.infer.load import Parts, TrainedArgs
from utils.runtime.command import run_command
from utils.runtime.errors import Problem, UserError, raise_if_any
from utils.runtime.log import setup_logging
from utils.storage.run_lock import hold_lock, lock_path_for

_SHOWN = 100  # so many rows that cannot be evaluated are named in the terminal


@dataclass
class EvaluateArgs(GenerateArgs, TrainedArgs):
    """Flags of this command."""

    eval_data_path: str | None = arg(
        None, "Rows with answers: .jsonl, .json, .csv, .parquet, a folder, a glob; separated by commas."
    )
    output: str | None = arg(None, "The .jsonl file for every row with answers and scores.")
    overwrite: bool = arg(False, "Replace --output and its summary.")
    compare_base: bool = arg(True, "Evaluate the base as well, where it is known what was trained.")
    max_rows: int | None = arg(None, "Only the first so many rows. Default: all.")
    batch_size: int = arg(16, "The most prompts, or choices, that are computed at once.")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "The type of the weights; auto: as they are saved.")
    metrics: str = arg(",".join(METRICS), "For generated answers: which scores, separated by commas.")
    choice_form: Literal["text", "letter"] = arg(
        "text",
        "For choices. text: the likelihood of each choice's text after the question alone; letter: the question lists "
        "the choices, and the likelihood is that of the letters.",
    )


def parse(argv: list[str] | None = None) -> tuple[EvaluateArgs, dict[str, Parts], list[str], set[str]]:
    """Reads the flags.

    Returns:
        the flags; the models by name; the metrics; the names of the flags that were given.

    Raises:
        UserError: with every problem at once.
    """
    values, given, problems = read_flags(make_parser([EvaluateArgs], "utils.script.evaluate", __doc__), argv)
    args = EvaluateArgs(**values)
    models, found = check_eval_models(args, args.compare_base, insist="compare_base" in given)
    metrics, unknown = check_metrics(args.metrics)
    problems += found + check_generate(args) + unknown
    files, found = [], ["--eval_data_path is missing; give rows with answers, such as data/sft_eval_data.jsonl"]
    if args.eval_data_path:
        files, found = find_files(args.eval_data_path, "--eval_data_path")
    problems += found + check_output(args.output, args.overwrite, files)
    for name in ("batch_size", "max_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value} is not allowed; give a whole number of at least 1")
    raise_if_any(problems)
    for note in files_left_out(args.eval_data_path, "--eval_data_path"):
        logger.info("{}", note)
    return args, models, metrics, given


def make_task(args: EvaluateArgs, kind: str, metrics: list[str], given: set[str]):
    """The way of assessing that the rows ask for; a flag of the other one is refused.

    Raises:
        UserError: a flag has no use.
    """
    others = {"generation": {"choice_form"}, "choices": {*GenerateArgs.__dataclass_fields__, "metrics"}}[kind]
    what = {"generation": "rows to answer in words", "choices": "rows with choices"}[kind]
    raise_if_any(
        f"--{name} {getattr(args, name)} has no use: --eval_data_path {args.eval_data_path!r} has {what}; leave it out"
        for name in sorted(others & given)
    )
    return Generation(args, metrics) if kind == "generation" else MultipleChoice(args.choice_form)


def encode_rows(task, eval_models: list[EvalModel], rows: list, problems: list[Problem]) -> dict[str, dict[int, list]]:
    """What each model is given for each row, by name and number; a row that one cannot be given, none gets."""
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


def _tell_problems(args: EvaluateArgs, problems: list[Problem], kept: int) -> None:
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    shown += f"\n  … and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
    if not kept:
        raise UserError(
            f"no row of --eval_data_path {args.eval_data_path!r} can be evaluated:{shown or ' it has none'}"
        )
    if problems:
        logger.warning("{:,} rows cannot be evaluated and are skipped:{}", len(problems), shown)


def ask(task, eval_model: EvalModel, encoded: dict[int, list], args: EvaluateArgs) -> dict[int, object]:
    """Loads a model, has it answer, and lets go of it; returns the answers by number, in the order of the rows."""
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
    torch.cuda.empty_cache()  # room for the next one
    return {number: answers[number] for number in encoded}


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args, *parsed = parse(argv)
    with hold_lock(lock_path_for(args.output), f"--output {args.output!r}"):
        raise_if_any(check_output(args.output, args.overwrite, []))  # another may have ended meanwhile
        evaluate(args, *parsed)


def evaluate(args: EvaluateArgs, models: dict[str, Parts], metrics: list[str], given: set[str]) -> None:
    """Evaluates what `parse` read, and writes rows and summary."""
    kind, rows, problems = read_task(args.eval_data_path, "--eval_data_path")
    task = make_task(args, kind, metrics, given)
    rows = rows[: args.max_rows]
    eval_models = load_eval_models(args, models)
    encoded = encode_rows(task, eval_models, rows, problems)
    kept = list(encoded[eval_models[0].name])
    _tell_problems(args, problems, len(kept))

    answers = {one.name: ask(task, one, encoded[one.name], args) for one in eval_models}
    scores = {
        name: {number: task.score(rows[number], found[number]) for number in kept} for name, found in answers.items()
    }
    asked = [rows[number] for number in kept]
    figures = {name: task.figures(asked, list(answers[name].values()), list(scores[name].values())) for name in answers}
    print(table(figures))
    lines = [
        task.tell(rows[number], *({name: of[name][number] for name in of} for of in (answers, scores)))
        for number in kept
    ]
    write(args.output, lines, summarise(args, task, eval_models, figures, len(kept), problems))
    skipped = f", {len(problems):,} skipped and named above" if problems else ""
    logger.info("{:,} rows evaluated{}: {}", len(kept), skipped, args.output)


if __name__ == "__main__":
    run_command(main)
