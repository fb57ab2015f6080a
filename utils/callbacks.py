"""What happens beside the training: figures for the log, and an orderly end on a signal."""

import signal

from loguru import logger
from transformers import TrainerCallback

from utils.errors import Interrupted
from utils.launch import any_process, command_of_launcher


class MetricsToLog(TrainerCallback):
    """Writes each line of figures into `train.log`; the progress bar shows them in the terminal."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            figures = ", ".join(
                f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in logs.items()
            )
            logger.debug("step {}: {}", state.global_step, figures)


class StopOnSignal(TrainerCallback):
    """SIGTERM and Ctrl-C end the training after the step, with a checkpoint; a second Ctrl-C at once.

    Each process may get the signal in another step, so all of them ask one another after each.

    Attributes:
        signum: the signal that came, if any.
    """

    def __init__(self):
        self.signum: int | None = None
        self._interrupts = 0
        self._before: dict = {}
        self._command: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._command = command_of_launcher()
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
            logger.warning("{}: the step is finished and saved first", signal.Signals(signum).name)
        self.signum = self.signum or signum

    def on_step_end(self, args, state, control, **kwargs):
        if self.signum is None and command_of_launcher() != self._command:
            self.signum = signal.SIGTERM
        if any_process(self.signum is not None, args.device) and state.global_step < state.max_steps:
            self.signum = self.signum or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def raise_if_stopped(self, state, output_dir: str) -> None:
        """Ends the command with the signal's exit code, where one ended the training.

        Raises:
            Interrupted: with what to type to go on.
        """
        if self.signum is not None and state.global_step < state.max_steps:
            raise Interrupted(
                self.signum,
                f"\nstopped after step {state.global_step:,} of {state.max_steps:,}, which is saved. To go on, give "
                f"the same command with --output_dir {output_dir} --resume_from_checkpoint true",
            )
