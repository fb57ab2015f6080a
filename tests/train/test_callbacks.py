"""The callbacks: a signal stops after the step, early stopping keeps its count, the best step is found again."""

import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from utils.runtime.errors import Interrupted
from utils.storage.run_folder import mark_complete
from utils.train.callbacks import CountScalerSkips, FindBest, StopEarly, StopOnSignal
from utils.train.nonfinite import note_skipped_step


@pytest.fixture
def stopping():
    callback, args = StopOnSignal(), SimpleNamespace(device="cpu")
    callback.on_train_begin(args, None, None)
    yield callback, args
    callback.on_train_end(args, None, None)


def test_a_signal_saves_and_stops_after_the_step(stopping):
    callback, args = stopping
    state, control = TrainerState(global_step=3, max_steps=9), TrainerControl()
    callback.on_step_end(args, state, control)
    assert not control.should_training_stop
    callback.raise_if_stopped(state, "…")
    os.kill(os.getpid(), signal.SIGTERM)
    callback.on_step_end(args, state, control)
    assert control.should_save and control.should_training_stop
    with pytest.raises(Interrupted, match="step 3 of 9(.|\n)*give the same command") as stopped:
        callback.raise_if_stopped(state, "give the same command")
    assert stopped.value.signum == signal.SIGTERM


def test_a_signal_in_the_last_step_ends_nothing(stopping):
    callback, args = stopping
    state, control = TrainerState(global_step=9, max_steps=9), TrainerControl()
    os.kill(os.getpid(), signal.SIGTERM)
    callback.on_step_end(args, state, control)
    callback.raise_if_stopped(state, "…")
    assert not control.should_training_stop


def test_a_second_ctrl_c_stops_at_once(stopping):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("count", "stops"), [(1, False), (2, True)])
def test_early_stopping_continues_its_count_on_resume(count, stops):
    state, control = TrainerState(), TrainerControl()
    kept = {"args": {}, "attributes": {"early_stopping_patience_counter": count}}
    state.stateful_callbacks = {"StopEarly": kept}
    callback = StopEarly(2, 0.0)
    callback.on_train_begin(SimpleNamespace(load_best_model_at_end=True), state, control)
    assert callback.early_stopping_patience_counter == count and control.should_training_stop is stops


def test_the_best_step_is_that_of_a_complete_checkpoint(tmp_path):
    for step in (1, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("x")
        mark_complete(tmp_path / f"checkpoint-{step}", {})
    losses = {1: 2.0, 2: 1.0, 3: 1.5, 4: float("nan")}
    state = TrainerState(log_history=[{"step": step, "eval_loss": loss} for step, loss in losses.items()])
    args = SimpleNamespace(
        load_best_model_at_end=True, resume_from_checkpoint=str(tmp_path / "checkpoint-3"), output_dir=str(tmp_path),
        metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    FindBest().on_train_begin(args, state, None)
    assert (state.best_metric, state.best_global_step) == (1.5, 3)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-3")


def optimizer_of_fp16(weight):
    """A gradient scaler on the CPU in accelerate's wrapper, as a GPU's fp16 training has it."""
    import torch
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)  # the wrapper reads its state
    return AcceleratedOptimizer(torch.optim.SGD([weight], lr=1.0), scaler=torch.amp.GradScaler("cpu", init_scale=4.0))


def test_steps_that_the_gradient_scaler_skips_are_counted():
    import torch

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, callback, state = optimizer_of_fp16(weight), CountScalerSkips(), TrainerState()
    for gradient in (1.0, math.inf, 1.0, math.nan, 1.0):
        before = weight.item()
        optimizer.scaler.scale(weight.sum()).backward()  # the scaler's first use
        weight.grad.fill_(gradient)
        optimizer.step()
        callback.on_optimizer_step(None, state, None, optimizer=optimizer)
        assert (weight.item() == before) is not math.isfinite(gradient)
        state.global_step += 1
        optimizer.zero_grad()
    assert state.log_history == [{"step": 2, "steps_skipped": 1}, {"step": 4, "steps_skipped": 2}]


def test_a_step_that_is_left_out_for_its_loss_is_not_counted_twice():
    skipped, state = SimpleNamespace(step_was_skipped=True), TrainerState(global_step=6)
    note_skipped_step(state)
    CountScalerSkips().on_optimizer_step(None, state, None, optimizer=skipped)
    assert state.log_history == [{"step": 7, "steps_skipped": 1}]


@pytest.mark.slow
def test_the_summary_counts_the_steps_that_fp16_skips(train, monkeypatch):
    """The scaler's own decision is planted: of three steps the second."""
    from accelerate.optimizer import AcceleratedOptimizer

    made, steps = AcceleratedOptimizer.step, []

    def step(self, closure=None):
        steps.append(self)
        self._is_overflow = len(steps) == 2
        return None if self._is_overflow else made(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    folder = train("--max_steps", "3")
    record = json.loads((folder / "train_args.json").read_text())
    assert record["summary"]["steps_skipped"] == 1
