"""Checkpoints: complete, or removed where the disk is full, and named when an interrupt ends the run."""

import errno
from types import SimpleNamespace

import pytest

from utils.model.pissa import IN_CHECKPOINT
from utils.run.save import save_history_on_exit
from utils.runtime.errors import UserError
from utils.storage.run_files import PISSA_START
from utils.storage.run_folder import checkpoints_of, is_incomplete, mark_complete, mark_incomplete, read_manifest
from utils.train.checkpointing import CompleteCheckpointMixin


class PlainTrainer:
    """A trainer that writes one file a checkpoint; `error` is raised after it is begun."""

    error = None
    is_deepspeed_enabled = False

    def __init__(self, folder):
        self.args = SimpleNamespace(output_dir=str(folder), should_save=True, save_only_model=False, process_index=0,
                                    load_best_model_at_end=True)  # fmt: skip
        self.state = SimpleNamespace(global_step=0, best_model_checkpoint=None)
        self.control = SimpleNamespace(should_save=False)
        self.model = SimpleNamespace(peft_config={})
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
        self.settings = {"must": {"train_mode": "lora"}}
        self.best = False

    def _save_checkpoint(self, model, trial):
        folder = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"
        with open(f"{folder}/weights", "w") as file:
            file.write("w" * self.state.global_step)
        if self.error:
            raise self.error

    def _determine_best_metric(self, metrics, trial):
        return self.best


class Trainer(CompleteCheckpointMixin, PlainTrainer):
    pass


def save(trainer, step):
    trainer.state.global_step = step
    trainer._save_checkpoint(trainer.model, None)
    return trainer


def test_a_checkpoint_is_marked_complete_with_its_files_and_settings(tmp_path):
    trainer = save(Trainer(tmp_path), 3)
    folder = tmp_path / "checkpoint-3"
    assert checkpoints_of(tmp_path) == [folder] and not is_incomplete(folder)
    manifest = read_manifest(folder)
    assert manifest["files"]["weights"] == 3 and manifest["settings"] == trainer.settings


def test_only_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    trainer = Trainer(tmp_path)
    trainer.save_limit = 2
    for step in (1, 2, 3, 4):
        save(trainer, step)
        trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-1", "checkpoint-4"]


def test_a_full_disk_removes_the_incomplete_checkpoint_and_names_the_remedy(tmp_path):
    trainer = save(Trainer(tmp_path), 1)
    trainer.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError) as stop:
        save(trainer, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    said = str(stop.value)
    assert "step 2 cannot be written" in said and "No space left" in said and "--resume_from_checkpoint true" in said


def test_an_error_that_is_not_the_disks_is_raised_as_it_is(tmp_path):
    trainer = Trainer(tmp_path)
    trainer.error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        save(trainer, 1)
    assert is_incomplete(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("initial", ["pissa", True])
def test_a_pissa_checkpoint_has_the_adapter_of_the_start(tmp_path, initial):
    start = tmp_path / PISSA_START
    start.mkdir()
    (start / "adapter_model.safetensors").write_text("start")
    trainer = Trainer(tmp_path)
    trainer.model.peft_config = {"default": SimpleNamespace(init_lora_weights=initial)}
    save(trainer, 1)
    assert (tmp_path / "checkpoint-1" / IN_CHECKPOINT).exists() == (initial == "pissa")


@pytest.mark.parametrize(("best", "at_end", "saves"), [(True, True, True), (True, False, False), (False, True, False)])
def test_the_best_step_is_saved_also_between_checkpoints(tmp_path, best, at_end, saves):
    trainer = Trainer(tmp_path)
    trainer.best, trainer.args.load_best_model_at_end = best, at_end
    assert trainer._determine_best_metric({}, None) is best
    assert trainer.control.should_save is saves


def test_without_optimizer_states_a_new_run_is_the_way_to_continue(tmp_path):
    trainer = save(Trainer(tmp_path), 1)
    assert trainer.how_to_resume().endswith("--resume_from_checkpoint true")
    trainer.args.save_only_model = True
    assert "--adapter_name_or_path" in trainer.how_to_resume() and "checkpoint-1" in trainer.how_to_resume()


@pytest.fixture
def interrupted_trainer(tmp_path):
    """A trainer with the checkpoint of step 2 complete and that of step 3 not."""
    made = CompleteCheckpointMixin()
    made.args = SimpleNamespace(output_dir=str(tmp_path), save_only_model=False)
    made.state = SimpleNamespace(log_history=[], max_steps=9)
    for step, finish in ((2, lambda folder: mark_complete(folder, {})), (3, mark_incomplete)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        finish(tmp_path / f"checkpoint-{step}")
    return made


def interrupted(trainer) -> str:
    with pytest.raises(KeyboardInterrupt) as stop, save_history_on_exit(trainer):
        raise KeyboardInterrupt
    return str(stop.value)


def test_an_interrupt_names_the_newest_complete_checkpoint_and_how_to_continue(interrupted_trainer, tmp_path):
    said = interrupted(interrupted_trainer)
    assert f"{tmp_path / 'checkpoint-2'}. To continue" in said
    assert f"--output_dir {tmp_path} --resume_from_checkpoint true" in said


def test_an_interrupt_before_the_first_checkpoint_says_how_to_start_anew(interrupted_trainer, tmp_path):
    (tmp_path / "checkpoint-2").rename(tmp_path / "elsewhere")
    said = interrupted(interrupted_trainer)
    assert said.startswith("No checkpoint is saved yet") and f"--output_dir {tmp_path} --overwrite_output_dir" in said
    assert "--resume_from_checkpoint" not in said
