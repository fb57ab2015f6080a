"""The steps of parsing: each resolves, then validates, and a check changes nothing."""

import copy

import pytest
from parsing import problems_of

from utils.config import parse as parsing_steps
from utils.runtime.errors import Problem

STARTS = [
    [],
    ["--val_size", "2", "--early_stopping_patience", "2", "--metric_for_best_model", "perplexity"],
    ["--precision", "fp16", "--bf16", "true", "--deepspeed", "zero22", "--load_best_model_at_end", "true"],
    ["--resume_from_checkpoint", "true", "--max_len", "1", "--lora_rank", "0", "--report_to", "none", "tensorboard"],
]


def state(settings):
    """All that a step could change, without what cannot be compared."""
    train_args = {} if settings.train_args is None else vars(settings.train_args)
    kept = {
        name: value for name, value in train_args.items() if isinstance(value, str | int | float | list | dict | None)
    }
    parts = (vars(settings.common), settings.values, settings.requested, settings.given, kept, settings.adapter)
    return copy.deepcopy([dict(part) if hasattr(part, "items") else part for part in parts])


@pytest.mark.parametrize("flags", STARTS)
def test_a_check_changes_nothing(parse, flags, monkeypatch):
    ran = []

    def watched(step):
        def validate(settings):
            before = state(settings)
            problems = step.validate(settings)
            assert state(settings) == before, step.name
            assert all(isinstance(problem, Problem) for problem in problems), step.name
            ran.append(step.name)
            return problems

        return step if step.validate is None else step._replace(validate=validate)

    monkeypatch.setattr(parsing_steps, "STEPS", tuple(map(watched, parsing_steps.STEPS)))
    problems = problems_of(parse, *flags) if flags in STARTS[2:] else parse(*flags) and []
    assert ran == [step.name for step in parsing_steps.STEPS if step.validate is not None]
    assert bool(problems) == (flags in STARTS[2:])


def test_checks_go_on_where_the_trainers_arguments_cannot_be_built(parse):
    problems = problems_of(parse, "--warmup_steps", "-1", "--lora_rank", "0", "--val_size", "2.5")
    text = "\n".join(problems)
    assert "the recipe's values do not fit together" in text
    assert "--lora_rank 0 is not allowed" in text and "--val_size 2.5 is not allowed" in text


def test_defaults_and_flags(parse):
    args, train_args = parse("--lora_rank=4", "--learning_rate", "3e-4", "--use_dora")
    assert (args.lora_rank, args.use_dora, args.task_type) == (4, True, "sft")
    assert train_args.learning_rate == 3e-4
    assert train_args.weight_decay == 0.0  # the recipe's own default


def test_local_rank_of_the_deepspeed_launcher_is_accepted(parse):
    _, train_args = parse("--local_rank=0")
    assert train_args.local_rank == 0


@pytest.mark.parametrize("also", [[], ["--save_strategy", "sometimes"]])
def test_all_problems_come_at_once(parse, also):
    problems = problems_of(
        parse,
        "--lerning_rate",
        "3",
        "--lora_rank",
        "x",
        "--train_mode",
        "lroa",
        "--template_name",
        "qwem",
        "--max_len",
        "1",
        "--lora_dropout",
        "1.5",
        *also,
    )
    text = "\n".join(problems)
    assert len(problems) == 6 + len(also) // 2
    for value, remedy in [
        ("--lerning_rate", "'--learning_rate'"),
        ("'x'", "number"),
        ("'lroa'", "'lora'"),
        ("'qwem'", "'qwen'"),
        ("--max_len 1", "at least 2"),
        ("--lora_dropout 1.5", "below 1"),
    ]:
        assert value in text and remedy in text
