"""The two methods of evaluation: scores of generated answers, and likelihoods of given choices."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from utils.data.bad_rows import BadRow
from utils.data.columns import rename_raw
from utils.data.files import find_files, read_rows
from utils.evaluate.metrics import Figure, score_file, score_row
from utils.evaluate.models import EvalModel
from utils.evaluate.multiple_choice import Choices, Scored, encode_choices, log_likelihoods, read_choices
from utils.infer.generate import GenerateArgs, answer_all, context_of, prompt_ids, report_cut
from utils.infer.prompts import Prompt, read_prompts, to_prompt
from utils.runtime.errors import Problem, UserError, raise_if_any


class Generation:
    """Scores generated answers against the answers in the rows.

    Args:
        args: how tokens are chosen.
        metrics: names of `utils.evaluate.metrics.METRICS`.
    """

    name = "generation"

    def __init__(self, args: GenerateArgs, metrics: list[str]):
        self.args, self.metrics = args, metrics

    def encode(self, eval_model: EvalModel, row: Prompt) -> list[int]:
        """The token ids of the prompt; raises a `UserError` if the row cannot be answered."""
        return prompt_ids(SimpleNamespace(config=eval_model.config), eval_model.tokenizer, row.messages, row.tools)

    def answer(
        self, model, eval_model: EvalModel, encoded: dict[int, list[int]], batch_size: int
    ) -> Iterator[tuple[int, str]]:
        """Yields (number of the row, its answer), batch by batch."""
        numbers = list(encoded)
        prompts, cut = list(encoded.values()), []
        found = answer_all(model, eval_model.tokenizer, prompts, self.args, batch_size, seeds=numbers, cut=cut)
        for place, text in found:
            yield numbers[place], text
        report_cut(eval_model.name, cut, len(prompts), self.args)

    def score(self, row: Prompt, answer: str) -> dict[str, float]:
        """The scores of a row."""
        return score_row(answer, row.reference, self.metrics)

    def output_row(self, row: Prompt, answers: dict[str, str], scores: dict[str, dict]) -> dict:
        """A line of the output."""
        content = {"question": row.messages[-1]["content"], "reference": row.reference}
        return {"file": row.file, "line": row.line, **content, "answers": answers, "scores": scores}

    def figures(self, rows: list[Prompt], answers: list[str], scores: list[dict]) -> list[Figure]:
        """The figures of a file."""
        return score_file(answers, [row.reference for row in rows], scores)


class MultipleChoice:
    """Scores multiple choice: a row is right if its right choice is the likeliest.

    Args:
        form: as in `utils.evaluate.multiple_choice.encode_choices`.
    """

    name = "choices"

    def __init__(self, form: str):
        self.form = form

    def encode(self, eval_model: EvalModel, row: Choices) -> list[Scored]:
        """A prompt with each choice; raises a `UserError` if the row cannot be encoded."""
        scored = encode_choices(row, eval_model.tokenizer, self.form)
        context, longest = context_of(eval_model.config), max(len(choice.ids) for choice in scored)
        if context and longest > context:
            raise UserError(
                f"with its longest choice it has {longest:,} tokens, and the model's context is {context:,}"
            )
        return scored

    def answer(
        self, model, eval_model: EvalModel, encoded: dict[int, list[Scored]], batch_size: int
    ) -> Iterator[tuple[int, list[float]]]:
        """Yields (number of the row, log-likelihood of each choice), as rows are completed."""
        owners = [(number, place) for number, scored in encoded.items() for place in range(len(scored))]
        flat = [choice for scored in encoded.values() for choice in scored]
        found: dict[int, dict[int, float]] = {number: {} for number in encoded}
        for at, value in log_likelihoods(model, flat, batch_size, eval_model.tokenizer.pad_token_id):
            number, place = owners[at]
            found[number][place] = value
            if len(found[number]) == len(encoded[number]):
                yield number, [found[number][place] for place in sorted(found[number])]

    def score(self, row: Choices, answer: list[float]) -> dict[str, Any]:
        """The likeliest choice, by its sum and by byte, with the log-likelihoods."""
        per_byte = [value / len(text.encode()) for value, text in zip(answer, row.texts, strict=True)]
        values = {"": answer} | ({"_per_byte": per_byte} if self.form == "text" else {})
        scores: dict[str, Any] = {}
        for ending, numbers in values.items():
            best = numbers.index(max(numbers))
            scores[f"log_likelihood{ending}"] = [round(number, 6) for number in numbers]
            scores[f"chosen{ending}"], scores[f"right{ending}"] = row.letters[best], best == row.answer
        return scores

    def output_row(self, row: Choices, answers: dict[str, list[float]], scores: dict[str, dict]) -> dict:
        """A line of the output."""
        choices = dict(zip(row.letters, row.texts, strict=True))
        content = {"question": row.messages[-1]["content"], "choices": choices, "answer": row.letters[row.answer]}
        return {"file": row.file, "line": row.line, **content, "scores": scores}

    def figures(self, rows: list[Choices], answers: list[list[float]], scores: list[dict]) -> list[Figure]:
        """The accuracies of a file, and that of guessing."""
        labels = {"right": "accuracy", "right_per_byte": "accuracy, likelihood per byte"}
        figures = [
            share_right(f"accuracy{key.removeprefix('right')}", label, [row[key] for row in scores])
            for key, label in labels.items()
            if key in scores[0]
        ]
        guessing = 100 * sum(1 / len(row.texts) for row in rows) / len(rows)
        return [*figures, Figure("guessing", "(guessing)", len(rows), guessing)]


def share_right(key: str, label: str, right: list[bool]) -> Figure:
    """The share p of right answers with its standard error, √(p (1 - p) / (n - 1))."""
    count, share = len(right), sum(right) / len(right)
    error = 100 * math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return Figure(key, label, count, 100 * share, error)


def read_task(paths: str, flag: str, columns: dict[str, str] | None = None) -> tuple[str, list, list[Problem]]:
    """Reads the rows to evaluate, and finds out which method they are for.

    Args:
        paths: files, folders and globs, separated by commas.
        flag: the flag's name, for the messages.
        columns: name in a format → name in the files, from `parse_columns`.

    Returns:
        `choices` if any row has choices, else `generation`; the rows; a problem for each row that cannot be used.

    Raises:
        UserError: a file cannot be read, or has rows for both methods.
    """
    files, problems = find_files(paths, flag)
    raise_if_any(problems)
    raws = [rename_raw(raw, columns or {}) for file in files for raw in read_rows(file)]
    if any(isinstance(raw.value, dict) and raw.value.get("choices") is not None for raw in raws):
        return "choices", *_rows_with_choices(raws, paths, flag)
    return "generation", *_prompts_with_reference(paths, flag, columns)


def _prompts_with_reference(
    paths: str, flag: str, columns: dict[str, str] | None
) -> tuple[list[Prompt], list[Problem]]:
    """The rows to generate answers for; those without a reference answer are problems."""
    prompts, problems = read_prompts(paths, flag, columns)
    problems += [
        Problem(
            f'{row.file}:{row.line} has no answer to compare with; give one as "output" or "reference"',
            file=row.file,
            line=row.line,
        )
        for row in prompts
        if row.reference is None
    ]
    return [row for row in prompts if row.reference is not None], problems


def _rows_with_choices(raws: list, paths: str, flag: str) -> tuple[list[Choices], list[Problem]]:
    """The rows of multiple choice; raises a `UserError` at one that is for generation."""
    rows, problems = [], []
    for raw in raws:
        place = f"{raw.file}:{raw.line}"
        if raw.fatal:
            raise UserError(f"{flag} {place} {raw.problem}")
        try:
            rows.append(read_choices(raw))
        except BadRow as error:
            if _is_prompt(raw.value):
                raise UserError(
                    f"{flag} {paths!r} has rows with choices, and {place} has none; evaluate them separately"
                ) from None
            problems.append(Problem(f"{place} {error}", file=raw.file, line=raw.line))
    return rows, problems


def _is_prompt(value: Any) -> bool:
    try:
        return "choices" not in value and bool(to_prompt(value))
    except (BadRow, TypeError):
        return False
