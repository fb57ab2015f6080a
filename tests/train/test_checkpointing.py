"""What an interrupt that ends a run at once says of its checkpoints."""

from types import SimpleNamespace

import pytest

from utils.run.save import keep_figures
from utils.storage.run_folder import mark_complete, mark_incomplete
from utils.train.checkpointing import CompleteCheckpointMixin


@pytest.fixture
def trainer(tmp_path):
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
    with pytest.raises(KeyboardInterrupt) as stop, keep_figures(trainer):
        raise KeyboardInterrupt
    return str(stop.value)


def test_an_interrupt_names_the_newest_complete_checkpoint_and_how_to_continue(trainer, tmp_path):
    said = interrupted(trainer)
    assert f"{tmp_path / 'checkpoint-2'}. To continue" in said
    assert f"--output_dir {tmp_path} --resume_from_checkpoint true" in said


def test_an_interrupt_before_the_first_checkpoint_says_how_to_start_anew(trainer, tmp_path):
    (tmp_path / "checkpoint-2").rename(tmp_path / "elsewhere")
    said = interrupted(trainer)
    assert said.startswith("No checkpoint is saved yet") and f"--output_dir {tmp_path} --overwrite_output_dir" in said
    assert "--resume_from_checkpoint" not in said
