"""What is said while a run trains."""

from loguru import logger
from transformers import TrainerCallback


class MetricsToLog(TrainerCallback):
    """Writes each line of figures into `train.log`; the progress bar shows them in the terminal."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            figures = ", ".join(
                f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in logs.items()
            )
            logger.debug("step {}: {}", state.global_step, figures)
