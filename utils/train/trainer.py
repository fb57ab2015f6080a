"""The mix-in that extends TRL's trainers, and the set-up of a built trainer before it trains."""

import functools
from pathlib import Path

from utils.model.tokenizer import save_chat_format
from utils.runtime.log import is_main_process
from utils.storage.run_files import PISSA_START
from utils.train.checkpointing import CompleteCheckpointMixin
from utils.train.nonfinite import NonFiniteStepMixin
from utils.train.resume import ResumeMixin


class FaultTolerantTrainerMixin(CompleteCheckpointMixin, NonFiniteStepMixin, ResumeMixin):
    """A mix-in for transformers' Trainer: complete checkpoints, exact resuming, NaN handling, more optimizers.

    Attributes:
        loraplus_lr_ratio, layerwise_lr_decay, use_muon: of CommonArgs, see `utils/train/optimizers.py`.
    """

    loraplus_lr_ratio: float | None = None
    layerwise_lr_decay: float | None = None
    use_muon: bool = False

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            from utils.train.optimizers import create_optimizer  # imports torch

            self.optimizer = create_optimizer(self, self.model if model is None else model)
        return super().create_optimizer(model)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            # transformers 5.23 trains one step too many if a finished run is resumed
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


def prepare_trainer(trainer, args, template, tokenizer) -> None:
    """Adds callbacks, and sets the chat format and stop tokens that every checkpoint is saved with.

    Args:
        trainer: from a task's `build_trainer`.
        args: CommonArgs.
        template: the chat format; None for a task without one.
        tokenizer: the run's, whose chat template is set.
    """
    from utils.train.callbacks import CountScalerSkips, FindBest, MetricsToLog, StopEarly, StopOnSignal

    trainer.add_callback(MetricsToLog())
    trainer.add_callback(CountScalerSkips())
    trainer.add_callback(FindBest())
    if args.early_stopping_patience:
        trainer.add_callback(StopEarly(args.early_stopping_patience, args.early_stopping_threshold))
    trainer.add_callback(StopOnSignal())
    # TRL 1.16 writes a model card with every checkpoint, and overwrites a README.md in the run's folder
    trainer.create_model_card = lambda *args, **kwargs: None
    model = trainer.model
    if hasattr(model, "create_or_update_model_card"):  # PEFT 0.21 saves an empty card template with adapters
        model.create_or_update_model_card = lambda *args, **kwargs: None
    if args.add_tokens and hasattr(model, "peft_config"):
        # the trained rows are all that is new in a resized embedding, which PEFT 0.21 would save twice
        model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    if template is not None:
        save_chat_format(tokenizer, template, model)
    if args.init_lora_weights == "pissa" and is_main_process():
        # the model is W0 - s·B0·A0 + s·B·A, so B0 and A0 are needed to save it as a plain LoRA on W0
        model.save_pretrained(Path(trainer.args.output_dir) / PISSA_START)


def raise_if_stopped(trainer) -> None:
    """Ends the command with the signal's exit code if a signal stopped the training.

    Raises:
        Interrupted: with the command that continues the run.
    """
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "raise_if_stopped"):
            callback.raise_if_stopped(trainer.state, trainer.how_to_resume())
