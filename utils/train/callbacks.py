"""Trainer callbacks: metrics in the log, the best step, early stopping, and a checkpoint on a signal."""

import signal
from math import isfinite, nan
from pathlib import Path

from loguru import logger
from transformers import EarlyStoppingCallback, TrainerCallback

from utils.runtime.distributed import any_rank, launcher_parent_pid
from utils.runtime.errors import Interrupted
from utils.storage.run_folder import read_manifest
from utils.train.nonfinite import count_skipped_steps, note_skipped_step


class MetricsToLog(TrainerCallback):
    """Writes the metrics of each logging step into `train.log`; the progress bar shows them in the terminal."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            figures = ", ".join(
                f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in logs.items()
            )
            logger.debug("step {}: {}", state.global_step, figures)


class CountScalerSkips(TrainerCallback):
    """Counts the steps that fp16's gradient scaler skips because a scaled gradient is infinite or NaN."""

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        noted = {"step": state.global_step + 1, "steps_skipped": count_skipped_steps(state)} in state.log_history[-1:]
        if getattr(optimizer, "step_was_skipped", False) and not noted:  # of accelerate's wrappers, also DeepSpeed's
            note_skipped_step(state)


class FindBest(TrainerCallback):
    """Finds the best step so far in the log history when a run is resumed.

    The checkpoint's own entry may be missing or stale: `--load_best_model_at_end` or `--metric_for_best_model` may have
    changed, and the best checkpoint may have been removed.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if not (args.load_best_model_at_end and args.resume_from_checkpoint):
            return
        figure, folders = args.metric_for_best_model, (Path(args.output_dir), Path(args.resume_from_checkpoint).parent)
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        for entry in state.log_history:
            candidates = [folder / f"checkpoint-{entry['step']}" for folder in folders]
            complete = next((folder for folder in candidates if read_manifest(folder) is not None), None)
            better = state.best_metric is None or (entry.get(figure, nan) > state.best_metric) == args.greater_is_better
            if complete and isfinite(entry.get(figure, nan)) and better and entry[figure] != state.best_metric:
                state.best_metric, state.best_global_step = entry[figure], entry["step"]
                state.best_model_checkpoint = str(complete)


class StopEarly(EarlyStoppingCallback):
    """transformers' early stopping, whose count of evaluations without improvement is kept on resume.

    transformers 5.23 restores the count only with `--restore_callback_states_from_checkpoint`.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if not control.should_training_stop or state.global_step >= state.max_steps:
            return
        if self.early_stopping_threshold:
            logger.info(
                "step {}: no evaluation was better by {:g} than the best {} before it, {} times in a row, training "
                "stops early",
                state.global_step,
                self.early_stopping_threshold,
                args.metric_for_best_model,
                self.early_stopping_patience_counter,
            )
        else:
            logger.info(
                "step {}: no better {} in {} evaluations than {:.6g} at step {}, training stops early",
                state.global_step,
                args.metric_for_best_model,
                self.early_stopping_patience_counter,
                state.best_metric,
                state.best_global_step,
            )


class StopOnSignal(TrainerCallback):
    """Stops the training on SIGTERM or Ctrl-C after the current step, with a checkpoint; a second Ctrl-C stops at once.

    Processes may get the signal in different steps, so after each step they share whether one of them got it.

    Attributes:
        signum: the signal that was received, or None.
    """

    def __init__(self):
        self.signum: int | None = None
        self._interrupts = 0
        self._before: dict = {}
        self._command: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._command = launcher_parent_pid()
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._before[signum] = signal.signal(signum, self._received)

    def on_train_end(self, args, state, control, **kwargs):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _received(self, signum, frame):
        self._interrupts += signum == signal.SIGINT
        if self._interrupts == 2:
            raise KeyboardInterrupt
        if self.signum is None:
            logger.warning("{}: stopping after this step, which is saved first", signal.Signals(signum).name)
        self.signum = self.signum or signum

    def on_step_end(self, args, state, control, **kwargs):
        if self.signum is None and launcher_parent_pid() != self._command:
            self.signum = signal.SIGTERM
        if any_rank(self.signum is not None, args.device) and state.global_step < state.max_steps:
            self.signum = self.signum or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def raise_if_stopped(self, state, how_to_resume: str) -> None:
        """Ends the command with the signal's exit code if a signal stopped the training.

        Args:
            state: the trainer's.
            how_to_resume: what to type to continue, from the trainer.

        Raises:
            Interrupted: with what to type to continue.
        """
        if self.signum is not None and state.global_step < state.max_steps:
            raise Interrupted(
                self.signum,
                f"\nstopped after step {state.global_step:,} of {state.max_steps:,}, which is saved. To continue, "
                f"{how_to_resume}",
            )
