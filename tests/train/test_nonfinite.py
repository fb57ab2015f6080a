"""Steps with a loss or gradients that are not finite: skipped or refused, with their rows named."""

import math
from types import SimpleNamespace

import pytest
import torch

from utils.runtime.errors import UserError
from utils.train.nonfinite import MAX_SKIPPED_IN_A_ROW, NonFiniteStepMixin, check_weights_finite, without_sources


class PlainTrainer:
    """A trainer whose losses and gradient norms are given, one a step."""

    def __init__(self, losses, norms=(), fp16=False):
        self.losses, self.norms = iter(losses), iter(norms)
        self.args = SimpleNamespace(fp16=fp16, device="cpu")
        self.state = SimpleNamespace(global_step=0, log_history=[])
        self.seen = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append(inputs)
        return torch.tensor(next(self.losses))

    def _get_grad_norm(self, model, grad_norm=None):
        return next(self.norms, 1.0)


class Trainer(NonFiniteStepMixin, PlainTrainer):
    files = ["a.jsonl"]

    def how_to_resume(self):
        return "give the command again"


@pytest.fixture
def model():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.ones(1, 2)
    return model


def step(trainer, model, *sources):
    """One optimizer step over batches of rows at these lines."""
    for lines in sources:
        trainer.training_step(model, {"input_ids": 1, "source": list(lines)})
    trainer._get_grad_norm(model)
    trainer.state.global_step += 1


def test_finite_steps_keep_their_gradients_and_the_model_gets_no_sources(model):
    trainer = Trainer([1.0, 2.0])
    step(trainer, model, [1], [2])
    assert trainer.seen == [{"input_ids": 1}] * 2
    assert model.weight.grad is not None and trainer.steps_skipped == 0 and trainer.state.log_history == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_bad_loss_stops_the_run_and_names_the_rows_of_its_batch(model, loss):
    trainer = Trainer([1.0, loss])
    with pytest.raises(UserError) as stop:
        step(trainer, model, [1, 2], [3])
    said = str(stop.value)
    assert f"step 1: the loss is {loss}" in said and "a.jsonl: line 3\n" in said
    assert "give the command again" in said


def test_a_bad_norm_names_all_rows_of_the_step(model):
    trainer = Trainer([1.0, 1.0], [math.inf])
    with pytest.raises(UserError) as stop:
        step(trainer, model, [1], [2])
    assert "the gradients' norm is inf" in str(stop.value)
    assert "a.jsonl: line 1, 2\n" in str(stop.value)


def test_with_fp16_a_bad_norm_is_left_to_the_gradient_scaler(model):
    step(Trainer([1.0], [math.inf], fp16=True), model, [1])
    assert model.weight.grad is not None


def test_a_skipped_step_has_no_gradients_and_is_counted(model):
    trainer = Trainer([math.nan, 1.0, math.nan])
    trainer.on_nan = "skip"
    step(trainer, model, [1])
    assert model.weight.grad is None  # not zeros, with which AdamW would still move the weights
    step(trainer, model, [2])
    step(trainer, model, [3])
    assert trainer.steps_skipped == 2
    assert trainer.state.log_history == [{"step": 1, "steps_skipped": 1}, {"step": 3, "steps_skipped": 2}]


def test_only_bad_steps_in_a_row_stop_a_run_that_skips(model):
    trainer = Trainer([math.nan] * (MAX_SKIPPED_IN_A_ROW - 1) + [1.0] + [math.nan] * MAX_SKIPPED_IN_A_ROW)
    trainer.on_nan = "skip"
    for line in range(2 * MAX_SKIPPED_IN_A_ROW - 1):
        step(trainer, model, [line])
    with pytest.raises(UserError, match=f"step {2 * MAX_SKIPPED_IN_A_ROW}:"):
        step(trainer, model, [99])


def test_sources_are_taken_out_of_a_batch_and_of_a_list_of_rows():
    assert without_sources({"input_ids": 1, "source": [3]}) == ({"input_ids": 1}, [3])
    assert without_sources({"input_ids": 1}) == ({"input_ids": 1}, [])
    rows = [{"text": "a", "source": [5, 4]}, {"text": "filler", "source": []}, {"text": "b", "source": [2]}]
    assert without_sources(rows) == ([{"text": "a"}, {"text": "b"}], [5, 4, 2])
    assert without_sources(rows[1:2]) == ([{"text": "filler"}], [])


def test_weights_that_are_not_finite_are_not_saved(model):
    trainer = SimpleNamespace(model=model, args=SimpleNamespace(output_dir="run"))
    check_weights_finite(trainer)
    model.weight.data[0, 1] = math.nan
    with pytest.raises(UserError, match="after the last step weight is not finite"):
        check_weights_finite(trainer)
    model.weight.requires_grad = False
    check_weights_finite(trainer)  # a frozen weight is not what the training made
