"""Evaluates a trained model on rows with answers, and its base beside it.

python -m utils.script.evaluate --model_path output/sft-20260101-120000 --eval_data_path data/sft_eval_data.jsonl \\
    --output eval.jsonl

Rows of any form that is trained on are answered, and each answer is compared with the row's: exact match, BLEU, chrF
and ROUGE-L, Chinese by character. Rows {"question", "choices", "answer"} are scored by the likelihood of each choice.
A file has rows of one kind. The table goes to stdout, every row with answers and scores to --output, the table with
all settings to <output>.summary.json.
"""

from loguru import logger

from utils.config.flags import make_parser, read_flags
from utils.data.columns import parse_columns
from utils.data.files import files_left_out, find_files
from utils.evaluate.evaluate import EvaluateArgs, evaluate
from utils.evaluate.metrics import check_metrics
from utils.evaluate.models import check_eval_models
from utils.evaluate.report import check_output
from utils.infer.generate import check_generate
from utils.infer.load import Parts, make_base
from utils.runtime.command import run_command
from utils.runtime.errors import raise_if_any
from utils.runtime.log import setup_logging
from utils.storage.run_lock import hold_lock, lock_path_for


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
    problems += found + parse_columns(args.columns)[1] + check_output(args.output, args.overwrite, files)
    for name in ("batch_size", "max_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value} is not allowed; give a whole number of at least 1")
    raise_if_any(problems)
    made = {name: make_base(args, parts) for name, parts in models.items()}
    if made != models:  # its weights can be compared with those in the run's record now
        models, problems = check_eval_models(args, args.compare_base, insist="compare_base" in given)
        raise_if_any(problems)
    for note in files_left_out(args.eval_data_path, "--eval_data_path"):
        logger.info("{}", note)
    return args, models, metrics, given


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args, *parsed = parse(argv)
    with hold_lock(lock_path_for(args.output), f"--output {args.output!r}"):
        raise_if_any(check_output(args.output, args.overwrite, []))  # another may have ended meanwhile
        evaluate(args, *parsed)


if __name__ == "__main__":
    run_command(main)
