"""The summary of a run: which evaluation is that of the saved weights, and how it is printed."""

from types import SimpleNamespace

import pytest

from utils.run.summary import evaluation_lines, evaluation_summary

HISTORY = [{"step": 1, "eval_loss": 2.0}, {"step": 2, "eval_loss": 1.0}, {"step": 3, "eval_loss": 1.5}]


def trainer(load_best, history=HISTORY, **args):
    state = SimpleNamespace(log_history=history, best_model_checkpoint="checkpoint-2", best_global_step=2)
    values = {"metric_for_best_model": None, "greater_is_better": False, "load_best_model_at_end": load_best}
    return SimpleNamespace(args=SimpleNamespace(**values | args), state=state)


@pytest.mark.parametrize(("load_best", "step", "loss"), [(True, 2, 1.0), (False, 3, 1.5)])
def test_the_evaluation_is_that_of_the_saved_weights(load_best, step, loss):
    found = evaluation_summary(trainer(load_best))
    assert (found["eval_step"], found["eval_loss"]) == (step, loss)
    assert (found["best_step"], found["best_figure"], found["best_kept"]) == (2, "eval_loss", load_best)
    text = evaluation_lines(found)
    saved = "that step" if load_best else "the last step"
    assert f"evaluation loss  {loss:.4f}" in text and f"best step        2 by eval_loss, saved is {saved}" in text
    assert ("--load_best_model_at_end" in text) is not load_best
    assert f"{loss:.4f} (2.0000 at step 1)\n" in text


def test_a_single_evaluation_is_printed_once():
    text = evaluation_lines(evaluation_summary(trainer(False, HISTORY[:1])))
    assert text.startswith("  evaluation loss  2.0000\n")


def test_a_metric_that_grows_has_its_best_at_the_maximum():
    values = {1: 0.5, 2: float("nan"), 3: 0.2}
    history = [{"step": step, "eval_loss": 1.0, "eval_x": value} for step, value in values.items()]
    found = evaluation_summary(trainer(False, history, metric_for_best_model="eval_x", greater_is_better=True))
    assert found["best_step"] == 1 and found["best_figure"] == "eval_x"


def test_without_an_evaluation_nothing_is_measured():
    found = evaluation_summary(trainer(False, [{"step": 1, "loss": 2.0}]))
    assert set(found.values()) == {None}
    assert evaluation_lines(found) == "  evaluation loss  not measured\n"


def test_accuracies_are_printed_in_percent():
    shares = {"eval_token_accuracy": 0.25, "eval_rewards/accuracies": 0.5}
    found = evaluation_summary(trainer(False, [{"step": 1, "eval_loss": 1.0, "eval_perplexity": 2.718, **shares}]))
    text = evaluation_lines(found)
    assert "perplexity 2.718, 25.0 % of the tokens right" in text and "50 % with the higher reward" in text
