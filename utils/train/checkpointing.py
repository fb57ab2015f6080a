"""Checkpoints that are either complete or removed, also where a disk fills up or a process is killed."""

import contextlib
import functools
import shlex
import shutil
from pathlib import Path
from unittest.mock import patch

from utils.model.adapter import ADAPTERS
from utils.model.base_config import saved_with
from utils.model.pissa import IN_CHECKPOINT
from utils.runtime.distributed import all_gather_objects, is_local_main_process, wait_for_everyone, world_size
from utils.runtime.errors import UserError, is_disk_error
from utils.storage.run_files import PISSA_START
from utils.storage.run_folder import (
    checkpoints_of,
    mark_complete,
    mark_incomplete,
    new_run_remedy,
    read_manifest,
    remove_incomplete_checkpoints,
    rotate_checkpoints,
)


class CompleteCheckpointMixin:
    """A mix-in for transformers' Trainer: a checkpoint is marked complete last, and a failed one is removed.

    Attributes:
        save_limit: how many checkpoints are kept. The Trainer's own `save_total_limit` is not used: transformers 5.23
            would delete complete checkpoints at the end of the training as well.
        base_config: the model's configuration as it was loaded, which is saved with the weights.
    """

    save_limit: int | None = None
    base_config = None

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._write_or_remove(folder, lambda: is_local_main_process() and mark_incomplete(folder))
        self._write_or_remove(folder, lambda: super(CompleteCheckpointMixin, self)._save_checkpoint(model, trial))
        self._write_or_remove(folder, lambda: self.args.should_save and self.complete_checkpoint(folder))
        if self.args.should_save:
            rotate_checkpoints(Path(self.args.output_dir), self.save_limit, self.state.best_model_checkpoint)

    def _save(self, *args, **kwargs):
        with saved_with(self.accelerator.unwrap_model(self.model), self.base_config):
            super()._save(*args, **kwargs)

    def complete_checkpoint(self, folder: Path) -> None:
        """Adds what transformers does not write, then the manifest that marks the checkpoint as complete."""
        if self.is_deepspeed_enabled and not self.args.save_only_model:
            (folder / "latest").write_text(f"global_step{self.model_wrapped.global_steps}", encoding="utf-8")
        start = folder.parent / PISSA_START / "adapter_model.safetensors"
        adapters = getattr(self.accelerator.unwrap_model(self.model), "peft_config", {}).values()
        if start.is_file() and any(getattr(config, "init_lora_weights", None) == "pissa" for config in adapters):
            shutil.copyfile(start, folder / IN_CHECKPOINT)  # needed to turn the adapter into a plain LoRA
        mark_complete(folder, self.settings)

    def _write_or_remove(self, folder: Path, write) -> None:
        """Writes a part of a checkpoint; if it fails on the disk of any process, the checkpoint is removed.

        Raises:
            UserError: on every process, if the write failed on one of them.
        """
        with self._failed_writes() as failed:
            try:
                write()
            except Exception as error:
                if not is_disk_error(error):
                    raise
                failed.append(error)
        where = f"process {self.args.process_index}: " if world_size() > 1 else ""
        failures = all_gather_objects([f"{where}{error}" for error in failed[:1]])
        if not failures:
            return
        if is_local_main_process():
            remove_incomplete_checkpoints(folder.parent)
        wait_for_everyone()
        free = shutil.disk_usage(self.args.output_dir).free / 1e9
        raise UserError(
            f"the checkpoint of step {self.state.global_step} cannot be written: {'; '.join(failures)}. "
            f"{free:.1f} GB are free on the disk of {self.args.output_dir!r}. The incomplete checkpoint is removed, "
            f"earlier ones are kept: free some space, then {self.how_to_resume()}"
        )

    @contextlib.contextmanager
    def _failed_writes(self):
        """Collects the errors of writes, so that a process that fails still reaches the barriers of the others.

        transformers 5.23 and DeepSpeed 0.19 let an error of one process leave the others waiting at a barrier, until
        it times out. The functions they write with are patched here: they note the error, and after it write nothing.
        """
        import torch

        failed: list[Exception] = []
        if world_size() == 1:
            yield failed
            return

        def collecting(write):
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
                patches.enter_context(patch.object(owner, name, collecting(getattr(owner, name))))
            if self.is_deepspeed_enabled:
                engine = self.model_wrapped
                patches.enter_context(
                    patch.object(engine, "_copy_recovery_script", collecting(engine._copy_recovery_script))
                )
                # DeepSpeed 0.19 would write `latest`, its pointer to the newest state, also if a state is incomplete;
                # complete_checkpoint writes it last
                save = functools.wraps(engine.save_checkpoint)(
                    functools.partial(engine.save_checkpoint, save_latest=False)
                )
                patches.enter_context(patch.object(engine, "save_checkpoint", save))
            yield failed

    def _determine_best_metric(self, metrics, trial):
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True  # transformers 5.23 saves it only if a checkpoint is due
        return is_best

    def how_to_resume(self) -> str:
        """The instruction, for messages, how to continue a run that ended before its last step."""
        folder, found = shlex.quote(self.args.output_dir), self._complete_checkpoints()
        if self.args.save_only_model and found:
            return new_run_remedy(shlex.quote(str(found[-1])), ADAPTERS[self.settings["must"]["train_mode"]].is_adapter)
        return f"give the same command with --output_dir {folder} --resume_from_checkpoint true"

    def _complete_checkpoints(self) -> list[Path]:
        return [folder for folder in checkpoints_of(Path(self.args.output_dir)) if read_manifest(folder) is not None]

    @contextlib.contextmanager
    def checkpoint_named_on_interrupt(self):
        """Adds to a KeyboardInterrupt, which ends the run before its step is saved, what to type to continue."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(self._after_interrupt()) from interrupt

    def _after_interrupt(self) -> str:
        if found := self._complete_checkpoints():
            return f"The newest checkpoint is {found[-1]}. To continue, {self.how_to_resume()}"
        folder = shlex.quote(self.args.output_dir)
        return (
            "No checkpoint is saved yet. To start anew, give the same command with "
            f"--output_dir {folder} --overwrite_output_dir true"
        )
