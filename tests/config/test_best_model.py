"""What keeping the best weights and stopping early set, and what they refuse."""

import pytest

from utils.runtime.errors import UserError

ROWS = ["--val_size", "2"]
PATIENT = [*ROWS, "--early_stopping_patience", "2"]
BEST = [*ROWS, "--load_best_model_at_end", "true"]


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (PATIENT, {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}),
        ([*ROWS, "--early_stopping_patience", "0"], {"load_best_model_at_end": False, "metric_for_best_model": None}),
        ([*BEST, "--eval_steps", "5"], {"save_steps": 5}),
        ([*BEST, "--save_steps", "7"], {"eval_steps": 7}),
        ([*BEST, "--eval_steps", "5", "--save_steps", "10"], {"eval_steps": 5, "save_steps": 10}),
        ([*BEST, "--eval_steps", "0.1", "--save_steps", "0.3"], {"save_steps": 0.3}),
        ([*BEST, "--eval_strategy", "epoch"], {"save_strategy": "epoch"}),
        ([*BEST, "--save_strategy", "epoch"], {"eval_strategy": "epoch"}),
        ([*BEST, "--save_strategy", "best"], {"eval_strategy": "steps", "save_strategy": "best"}),
        ([*ROWS, "--save_strategy", "best"], {"metric_for_best_model": "eval_loss"}),
        ([*BEST, "--metric_for_best_model", "perplexity"], {"greater_is_better": False}),
        ([*BEST, "--metric_for_best_model", "eval_token_accuracy"], {"greater_is_better": True}),
    ],
)
def test_what_is_needed_is_set(parse, flags, wanted):
    _, train_args = parse(*flags)
    assert {name: getattr(train_args, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--early_stopping_patience", "2"], ["early_stopping_patience 2", "--eval_data_path or --val_size"]),
        (["--load_best_model_at_end", "true"], ["load_best_model_at_end true", "--eval_data_path or --val_size"]),
        ([*ROWS, "--early_stopping_patience", "-1"], ["-1", "0 for never"]),
        ([*PATIENT, "--early_stopping_threshold", "-0.1"], ["-0.1", "at least 0"]),
        ([*ROWS, "--early_stopping_threshold", "0.1"], ["0.1", "--early_stopping_patience"]),
        ([*PATIENT, "--load_best_model_at_end", "false"], ["--load_best_model_at_end false", "leave it out"]),
        ([*PATIENT, "--save_strategy", "no"], ["--save_strategy no", "--save_strategy best"]),
        ([*PATIENT, "--eval_strategy", "no"], ["--eval_strategy no", "steps or epoch"]),
        ([*BEST, "--eval_strategy", "epoch", "--save_strategy", "steps"], ["epoch", "steps"]),
        ([*BEST, "--eval_steps", "3", "--save_steps", "4"], ["--save_steps 4", "--eval_steps 3", "multiple"]),
        ([*BEST, "--eval_steps", "0.1", "--save_steps", "4"], ["--save_steps 4", "--eval_steps 0.1", "both"]),
        ([*BEST, "--metric_for_best_model", "eval_los"], ["'eval_los'", "eval_loss", "eval_token_accuracy"]),
        ([*BEST, "--metric_for_best_model", "loss", "--greater_is_better", "true"], ["less is better"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(parse, flags, parts):
    with pytest.raises(UserError) as error:
        parse(*flags, "--lora_rank", "0")
    told = [problem for problem in error.value.problems if "lora_rank" not in problem.flags]
    assert len(told) == 1 and len(error.value.problems) == 2, error.value.problems
    assert all(part in str(told[0]) for part in parts), told
