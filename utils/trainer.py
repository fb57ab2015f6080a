"""What every trainer here adds to TRL's: LoRA+, checkpoints that are whole, and a stop at numbers that are none."""

import math
import shutil
from pathlib import Path

from loguru import logger

from utils.checkpoints import mark_complete, rotate
from utils.data_report import name_sources
from utils.errors import StoppedError, UserError
from utils.launch import wait_for_all


class Surviving:
    """A mix-in for transformers' Trainer.

    Attributes:
        loraplus_lr_ratio: LoRA's B learns so many times as fast as A (LoRA+, arXiv 2402.12354).
        on_nan: `stop`, or `skip` to leave out a step whose loss or gradients are not finite.
        settings: what a checkpoint must have in common with a run that goes on from it.
        files: the data files, to name rows by.
        steps_skipped: how many steps were left out.
    """

    loraplus_lr_ratio: float | None = None
    on_nan = "stop"
    settings: dict = {}
    files: list[str] = []
    steps_skipped = 0

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.loraplus_lr_ratio is not None:
            from peft.optimizers import create_loraplus_optimizer

            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = create_loraplus_optimizer(
                model,
                optimizer_class,
                loraplus_lr_ratio=self.loraplus_lr_ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **options,
            )
        return super().create_optimizer(model)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # transformers would train one step more when a finished run is resumed
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ------------------------------------------------------------------ checkpoints
    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go once this one is whole
        try:
            super()._save_checkpoint(model, trial)
            wait_for_all()
            if self.args.should_save:
                mark_complete(folder, self.settings)
        except Exception as error:
            if not _is_about_the_disk(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(self.args.output_dir).free / 1e9
            raise StoppedError(
                f"the checkpoint of step {self.state.global_step} cannot be written: {error}. {free:.1f} GB are free "
                f"on the disk of {self.args.output_dir!r}. The unfinished one is removed, earlier ones are whole: make "
                "room, then give the same command with --resume_from_checkpoint true"
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate(Path(self.args.output_dir), limit, self.state.best_model_checkpoint)

    # ------------------------------------------------------------------ numbers that are none
    def training_step(self, model, inputs, num_items_in_batch=None):
        sources = inputs.pop("source", [])
        self._step_sources = getattr(self, "_step_sources", []) + sources
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            self._not_finite(f"the loss is {loss.item()}", sources)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        sources, self._step_sources = getattr(self, "_step_sources", []), []
        if norm is None or math.isfinite(norm) or self.args.fp16:  # fp16's scaler leaves such a step out by itself
            return norm
        self._not_finite(f"the gradients' norm is {float(norm)}", sources)
        # without gradients the optimizer moves nothing, not even by its momentum
        model.zero_grad(set_to_none=True)
        self.steps_skipped += 1
        return norm

    def _not_finite(self, what: str, sources: list[int]) -> None:
        step = self.state.global_step + 1
        rows = name_sources(sources, self.files)
        if self.on_nan == "skip":
            logger.warning("step {}: {}, the step is left out; its rows are{}", step, what, rows)
            return
        raise StoppedError(
            f"step {step}: {what}; its rows are{rows}\n   Look at these rows, lower --learning_rate or raise "
            "--warmup_steps, use --precision bf16 or fp32 rather than fp16; --on_nan skip goes on without such a step. "
            "Checkpoints written before are whole: --resume_from_checkpoint true goes on from the newest"
        )

    def prediction_step(self, model, inputs, *args, **kwargs):
        inputs.pop("source", None)
        return super().prediction_step(model, inputs, *args, **kwargs)


def _is_about_the_disk(error: Exception) -> bool:
    """Whether a write failed; torch and safetensors tell it in exceptions of their own."""
    if isinstance(error, UserError):
        return False
    signs = ("no space left", "file write failed", "unexpected pos", "os error", "file too large")
    return isinstance(error, OSError) or any(sign in str(error).lower() for sign in signs)
