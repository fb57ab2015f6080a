"""Stops at, or skips, steps whose loss or gradients are not finite, and names their rows."""

import math

from loguru import logger

from utils.data.places import format_sources
from utils.runtime.distributed import all_gather_objects, any_rank
from utils.runtime.errors import UserError

MAX_SKIPPED_IN_A_ROW = 10  # so many bad steps in a row come from the weights, not from the rows


class NonFiniteStepMixin:
    """A mix-in for transformers' Trainer: no optimizer step is taken with a loss or gradients that are not finite.

    Attributes:
        on_nan: `stop`, or `skip` to leave such a step out.
        files: the data files, by which rows are named.
        batch_sources: the column `source` of the batch at hand, in the order of its sequences.
        steps_skipped: how many steps were skipped, also before a resume and by the gradient scaler of fp16.
    """

    on_nan = "stop"
    files: list[str] = []
    batch_sources: list[int] = []
    _skipped_in_a_row = 0
    _bad_loss: float | None = None
    _step_sources: list[int] = []
    _bad_sources: list[int] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs, sources = without_sources(inputs)
        self.batch_sources = sources
        self._step_sources = self._step_sources + sources
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            self._bad_sources = self._bad_sources + sources
            self._bad_loss = loss.item()
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # with fp16 the gradient scaler skips such a step itself and lowers its scale
        bad_norm = norm is not None and not math.isfinite(norm) and not self.args.fp16
        if any_rank(bool(self._bad_sources) or bad_norm, self.args.device):
            self._skip_or_stop(norm)
            # None rather than 0: with zeros, AdamW's momentum and weight decay would still move the weights
            model.zero_grad(set_to_none=True)
        else:
            self._skipped_in_a_row = 0
        self._step_sources, self._bad_sources, self._bad_loss = [], [], None
        return norm

    @property
    def steps_skipped(self) -> int:
        return count_skipped_steps(self.state)

    def _skip_or_stop(self, norm) -> None:
        """Logs a bad step if it may be skipped. Called on every process in the same step, as it gathers the rows.

        Args:
            norm: of the gradients; None if it is not computed.

        Raises:
            UserError: with the step and its rows.
        """
        bad = all_gather_objects(self._bad_sources)
        self._bad_loss = next((loss for loss in all_gather_objects([self._bad_loss]) if loss is not None), math.nan)
        rows = format_sources(bad or all_gather_objects(self._step_sources), self.files)
        what = f"the loss is {self._bad_loss}" if bad else f"the gradients' norm is {float(norm)}"
        step = self.state.global_step + 1
        note_skipped_step(self.state)
        self._skipped_in_a_row += 1
        if self.on_nan == "skip" and self._skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            logger.warning("step {}: {}, the step is skipped; its rows are{}", step, what, rows)
            return
        raise UserError(
            f"step {step}: {what}; its rows are{rows}\n   Look at these rows, lower --learning_rate or raise "
            "--warmup_steps, use --precision bf16 or fp32 rather than fp16, or skip such steps with --on_nan skip, "
            f"which stops after {MAX_SKIPPED_IN_A_ROW} in a row. Earlier checkpoints are kept: {self.how_to_resume()}"
        )

    def prediction_step(self, model, inputs, *args, **kwargs):
        return super().prediction_step(model, without_sources(inputs)[0], *args, **kwargs)


def count_skipped_steps(state) -> int:
    """Counts the steps noted in the log history, which a resumed run continues."""
    return sum("steps_skipped" in entry for entry in state.log_history)


def note_skipped_step(state) -> None:
    """Notes in the log history that the step at hand is skipped.

    Args:
        state: the trainer's, before `global_step` is raised.
    """
    state.log_history.append({"step": state.global_step + 1, "steps_skipped": count_skipped_steps(state) + 1})


def without_sources(inputs: dict | list[dict]) -> tuple[dict | list[dict], list[int]]:
    """Splits the column `source` off the inputs of a step; returns the other inputs, and the sources of the rows.

    Args:
        inputs: from a collator, or the list of prepared rows for a task without one. Rows of a list that only fill up
            the step are removed, unless there are no others.
    """
    if isinstance(inputs, list):
        rows = [row for row in inputs if row.get("source")] or inputs[:1]
        sources = [source for row in rows for source in row.get("source", [])]
        return [{name: value for name, value in row.items() if name != "source"} for row in rows], sources
    return {name: value for name, value in inputs.items() if name != "source"}, inputs.get("source", [])


def check_weights_finite(trainer) -> None:
    """Refuses trained weights that are not finite, before they are saved: the last step may have made them so.

    Raises:
        UserError: with the name of one of them.
    """
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad and not weight.detach().isfinite().all():
            raise UserError(
                f"after the last step {name} is not finite, so nothing is saved; lower --learning_rate. Earlier "
                f"checkpoints are kept in --output_dir {trainer.args.output_dir}"
            )
