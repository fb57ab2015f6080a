"""What every trainer here adds to TRL's: LoRA+, checkpoints that are whole, and a stop at numbers that are none."""

import contextlib
import functools
import math
import shlex
import shutil
from pathlib import Path
from unittest.mock import patch

from loguru import logger

from utils.data.places import format_sources
from utils.model.base_config import saved_with
from utils.model.pissa import IN_CHECKPOINT
from utils.runtime.distributed import all_gather_objects, any_rank, is_local_main_process, wait_for_everyone, world_size
from utils.runtime.errors import UserError, is_disk_error
from utils.storage.run_files import PISSA_START
from utils.storage.run_folder import (
    checkpoints_of,
    mark_complete,
    mark_incomplete,
    new_run_remedy,
    remove_incomplete_checkpoints,
    rotate_checkpoints,
)
from utils.train.resume import Resumable

SKIPPED_AT_MOST = 10  # so many steps in a row are left out at most: then it is the weights, not the rows


class Surviving(Resumable):
    """A mix-in for transformers' Trainer.

    Attributes:
        loraplus_lr_ratio: LoRA's B learns so many times as fast as A (LoRA+, arXiv 2402.12354).
        on_nan: `stop`, or `skip` to leave out a step whose loss or gradients are not finite.
        files: the data files, to name rows by.
        save_limit: how many checkpoints are kept; transformers' own limit would also remove whole ones at the end.
        base_config: the model's configuration as it was loaded, which is saved with the weights.
    """

    loraplus_lr_ratio: float | None = None
    on_nan = "stop"
    files: list[str] = []
    save_limit: int | None = None
    base_config = None
    _skipped_in_a_row = 0
    _bad_loss: float | None = None
    _step_sources: list[int] = []
    _bad_sources: list[int] = []

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
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            # transformers would train one step more when a finished run is resumed
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ------------------------------------------------------------------ checkpoints
    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._write_or_give_up(folder, lambda: is_local_main_process() and mark_incomplete(folder))
        self._write_or_give_up(folder, lambda: super(Surviving, self)._save_checkpoint(model, trial))
        self._write_or_give_up(folder, lambda: self.args.should_save and self._complete(folder))
        if self.args.should_save:
            rotate_checkpoints(Path(self.args.output_dir), self.save_limit, self.state.best_model_checkpoint)

    def _save(self, *args, **kwargs):
        with saved_with(self.accelerator.unwrap_model(self.model), self.base_config):
            super()._save(*args, **kwargs)

    def _complete(self, folder: Path) -> None:
        if self.is_deepspeed_enabled and not self.args.save_only_model:
            (folder / "latest").write_text(f"global_step{self.model_wrapped.global_steps}", encoding="utf-8")
        start = folder.parent / PISSA_START / "adapter_model.safetensors"
        adapters = getattr(self.accelerator.unwrap_model(self.model), "peft_config", {}).values()
        if start.is_file() and any(getattr(config, "init_lora_weights", None) == "pissa" for config in adapters):
            shutil.copyfile(start, folder / IN_CHECKPOINT)  # without it the weights cannot be computed
        mark_complete(folder, self.settings)

    def _write_or_give_up(self, folder: Path, write) -> None:
        """Writes a part of a checkpoint; where the disk of any process is full, all of them remove it and stop.

        Raises:
            UserError: on every process.
        """
        with self._failed_writes() as failed:
            try:
                write()
            except Exception as error:
                if not is_disk_error(error):
                    raise
                failed.append(error)
        where = f"process {self.args.process_index}: " if world_size() > 1 else ""
        told = all_gather_objects([f"{where}{error}" for error in failed[:1]])
        if not told:
            return
        if is_local_main_process():
            remove_incomplete_checkpoints(folder.parent)
        wait_for_everyone()
        free = shutil.disk_usage(self.args.output_dir).free / 1e9
        raise UserError(
            f"the checkpoint of step {self.state.global_step} cannot be written: {'; '.join(told)}. {free:.1f} GB are "
            f"free on the disk of {self.args.output_dir!r}. The unfinished one is removed, earlier ones are whole: "
            f"make room, then {self.how_to_go_on()}"
        )

    @contextlib.contextmanager
    def _failed_writes(self):
        """Collects the errors of writes, each of several processes going on to where the others wait for it."""
        import torch

        failed: list[Exception] = []
        if world_size() == 1:
            yield failed
            return

        def going_on(write):
            def attempt(*args, **kwargs):
                try:
                    return None if failed else write(*args, **kwargs)
                except Exception as error:
                    if not is_disk_error(error):
                        raise
                    failed.append(error)

            return attempt

        with contextlib.ExitStack() as patches:
            for owner, name in ((torch, "save"), (self, "_save")):
                patches.enter_context(patch.object(owner, name, going_on(getattr(owner, name))))
            if self.is_deepspeed_enabled:
                engine = self.model_wrapped
                patches.enter_context(
                    patch.object(engine, "_copy_recovery_script", going_on(engine._copy_recovery_script))
                )
                # its pointer to the newest state is written with the manifest, once all have written theirs
                save = functools.wraps(engine.save_checkpoint)(
                    functools.partial(engine.save_checkpoint, save_latest=False)
                )
                patches.enter_context(patch.object(engine, "save_checkpoint", save))
            yield failed

    def _determine_best_metric(self, metrics, trial):
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True  # evaluated more often than saved, the best would have no checkpoint
        return is_best

    def how_to_go_on(self) -> str:
        """What to type once a run has ended before its last step."""
        folder, found = shlex.quote(self.args.output_dir), checkpoints_of(Path(self.args.output_dir))
        if self.args.save_only_model and found:
            return new_run_remedy(shlex.quote(str(found[-1])), self.settings["must"]["train_mode"])
        return f"give the same command with --output_dir {folder} --resume_from_checkpoint true"

    # ------------------------------------------------------------------ numbers that are none
    def training_step(self, model, inputs, num_items_in_batch=None):
        sources = inputs.pop("source", [])
        self._step_sources = self._step_sources + sources
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            self._bad_sources = self._bad_sources + sources
            self._bad_loss = loss.item()
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # fp16's scaler leaves a step whose gradients are not finite out by itself, and lowers its scale
        bad_norm = norm is not None and not math.isfinite(norm) and not self.args.fp16
        if any_rank(bool(self._bad_sources) or bad_norm, self.args.device):
            self._not_finite(norm)
            # without gradients the optimizer moves nothing, not even by its momentum
            model.zero_grad(set_to_none=True)
        else:
            self._skipped_in_a_row = 0
        self._step_sources, self._bad_sources, self._bad_loss = [], [], None
        return norm

    @property
    def steps_skipped(self) -> int:
        """How many steps were left out; kept in the history, which a resumed run goes on with."""
        return sum("steps_skipped" in entry for entry in self.state.log_history)

    def _not_finite(self, norm) -> None:
        """Every process comes here in the same step; together they know the rows."""
        bad = all_gather_objects(self._bad_sources)
        self._bad_loss = next((loss for loss in all_gather_objects([self._bad_loss]) if loss is not None), math.nan)
        rows = format_sources(bad or all_gather_objects(self._step_sources), self.files)
        what = f"the loss is {self._bad_loss}" if bad else f"the gradients' norm is {float(norm)}"
        step = self.state.global_step + 1
        self.state.log_history.append({"step": step, "steps_skipped": self.steps_skipped + 1})
        self._skipped_in_a_row += 1
        if self.on_nan == "skip" and self._skipped_in_a_row < SKIPPED_AT_MOST:
            logger.warning("step {}: {}, the step is left out; its rows are{}", step, what, rows)
            return
        raise UserError(
            f"step {step}: {what}; its rows are{rows}\n   Look at these rows, lower --learning_rate or raise "
            "--warmup_steps, use --precision bf16 or fp32 rather than fp16; --on_nan skip goes on without such a step, "
            f"but not without {SKIPPED_AT_MOST} in a row. Checkpoints written before are whole: {self.how_to_go_on()}"
        )

    def prediction_step(self, model, inputs, *args, **kwargs):
        inputs.pop("source", None)
        return super().prediction_step(model, inputs, *args, **kwargs)


def refuse_broken_weights(trainer) -> None:
    """Weights that are not finite are not saved as if the run were finished: the last step may have broken them.

    Raises:
        UserError: naming one of them.
    """
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad and not weight.detach().isfinite().all():
            raise UserError(
                f"after the last step {name} is not finite, so nothing is saved; lower --learning_rate. Checkpoints "
                f"written before stay in --output_dir {trainer.args.output_dir}"
            )
