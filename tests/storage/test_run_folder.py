"""Only files that a run wrote are ever deleted, of checkpoints and of the run's folder."""

import json

import pytest

import main_train
from utils.storage.run_folder import (
    INCOMPLETE,
    MANIFEST,
    checkpoints_of,
    mark_complete,
    mark_incomplete,
    read_manifest,
    remove_checkpoint,
    remove_incomplete_checkpoints,
    rotate_checkpoints,
)  # fmt: skip

STEPS = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "9"]
OVER = ["--overwrite_output_dir", "true"]


def contents(folder) -> dict:
    """Every file below a folder with its bytes, symbolic links as what they lead to."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def checkpoint_in(run, step, **files):
    """A checkpoint as a run writes one."""
    folder = run / f"checkpoint-{step}"
    mark_incomplete(folder)
    write(folder, **(files or {"weights": "w", "optimizer": "o"}))
    mark_complete(folder, {})
    return folder


# ---------------------------------------------------------------------- checkpoints
def test_a_checkpoint_that_its_owner_changed_stays(tmp_path):
    trimmed, foreign, link = checkpoint_in(tmp_path, 1), tmp_path / "checkpoint-2", tmp_path / "checkpoint-3"
    (trimmed / "optimizer").unlink()
    write(foreign, weights="theirs")
    elsewhere = checkpoint_in(tmp_path / "disk", 3)
    link.symlink_to(elsewhere)
    before = contents(tmp_path)
    assert remove_incomplete_checkpoints(tmp_path) == []
    for step in (4, 5):
        checkpoint_in(tmp_path, step)
    rotate_checkpoints(tmp_path, 1, None)
    for folder in (trimmed, foreign, link):
        remove_checkpoint(folder)
    assert contents(tmp_path).items() >= before.items()
    assert [path.name for path in checkpoints_of(tmp_path)] == [f"checkpoint-{step}" for step in (1, 2, 3, 5)]


def test_what_lies_beside_a_checkpoints_files_stays(tmp_path):
    folder = checkpoint_in(tmp_path, 1)
    (folder / "global_step1").mkdir()
    write(folder, **{"model.gguf": "mine"})
    write(folder / "sub", notes="mine")
    mark_incomplete(folder)  # the same step is saved again
    write(folder, weights="new")
    write(folder / "global_step1", states="s")
    assert json.loads((folder / INCOMPLETE).read_text())["foreign"] == ["model.gguf", "sub/notes"]
    mark_complete(folder, {})
    assert {*read_manifest(folder)["files"]} == {"weights", "optimizer", "global_step1/states"}
    remove_checkpoint(folder)
    assert contents(tmp_path) == {"checkpoint-1/model.gguf": b"mine", "checkpoint-1/sub/notes": b"mine"}
    assert not (folder / "global_step1").exists() and read_manifest(folder) is None


def test_a_save_that_was_killed_is_removed_wherever_it_was(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()  # before its first file
    write(tmp_path / "checkpoint-2", **{f"{INCOMPLETE}.part": '{"for'})
    mark_incomplete(tmp_path / "checkpoint-3")
    write(tmp_path / "checkpoint-3", weights="ha", **{f"{MANIFEST}.part": "{"})
    half_removed = checkpoint_in(tmp_path, 4)
    mark_incomplete(half_removed)
    (half_removed / "weights").unlink()
    assert remove_incomplete_checkpoints(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert list(tmp_path.iterdir()) == []


def test_a_list_that_names_files_elsewhere_removes_none_of_them(tmp_path):
    """The list comes with the folder, which may be someone else's."""
    write(tmp_path, mine="x")
    write(tmp_path / "outside", deep="x")
    folder = tmp_path / "run" / "checkpoint-1"
    write(folder, weights="w")
    (folder / "out").symlink_to(tmp_path / "outside")
    names = ["weights", "../../mine", str(tmp_path / "mine"), "out/deep"]
    sizes = {name: (folder / name).stat().st_size for name in names}
    (folder / MANIFEST).write_text(json.dumps({"settings": {}, "files": sizes}))
    assert read_manifest(folder) is not None
    remove_checkpoint(folder)
    assert (tmp_path / "mine").exists() and (tmp_path / "outside" / "deep").exists()
    assert not (folder / "weights").exists()


# ---------------------------------------------------------------------- resuming
def test_resuming_leaves_older_checkpoints_without_optimizer_alone(train, copied):
    folder = copied("--max_steps", "3", *STEPS)
    (folder / "checkpoint-1" / "optimizer.pt").unlink()
    before = contents(folder / "checkpoint-1")
    train("--max_steps", "4", *STEPS, "--resume_from_checkpoint", "true", "--save_total_limit", "1")
    assert contents(folder / "checkpoint-1") == before
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-1", "checkpoint-4"]


def test_a_newer_checkpoint_that_was_changed_is_not_written_over(copied, refused):
    folder = copied("--max_steps", "3", *STEPS)
    record = json.loads((folder / "train_args.json").read_text())["common"]
    (folder / "checkpoint-3" / "optimizer.pt").unlink()
    before = contents(folder)
    paths = [word for name in ("model_name_or_path", "train_data_path") for word in (f"--{name}", record[name])]
    for flags in ([], OVER):
        said = refused(main_train.main, *paths, "--output_dir", str(folder), "--resume_from_checkpoint", "true", *flags)
        assert "holds 'checkpoint-3', which is newer" in said and "move it away" in said
    assert contents(folder) == before


# ---------------------------------------------------------------------- --overwrite_output_dir
@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "train.log", "checkpoint-7/weights"])
def test_a_folder_that_no_run_made_is_not_overwritten(name, tmp_path, refused, tiny_models, rows_file):
    folder = tmp_path / "theirs"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--output_dir", str(folder)]
    said = refused(main_train.main, *flags, *OVER)
    assert f"holds {name.partition('/')[0]!r}, which no run of this project wrote" in said
    assert contents(folder) == {name: b"mine"}


def test_only_what_the_run_wrote_is_overwritten(train, copied, refused, tmp_path):
    folder = copied("--max_steps", "2", *STEPS)
    write(folder, **{"notes.txt": "mine", "model.gguf": "mine"})
    write(folder / "checkpoint-1", **{"notes.txt": "mine"})
    train("--max_steps", "1", *OVER)
    left = contents(folder)
    assert left["notes.txt"] == left["model.gguf"] == left["checkpoint-1/notes.txt"] == b"mine"
    assert not (folder / "checkpoint-2").exists() and {path.name for path in (folder / "checkpoint-1").iterdir()} == {
        "notes.txt"
    }


@pytest.mark.parametrize("change", ["weights", "more weights", "checkpoint", "link"])
def test_what_was_changed_in_a_runs_folder_is_not_overwritten(change, copied, refused, tmp_path):
    folder = copied("--max_steps", "1", *STEPS)
    record = json.loads((folder / "train_args.json").read_text())
    assert record["files"]["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").stat().st_size
    name = {"weights": "adapter_model.safetensors", "more weights": "model.safetensors"}.get(change, "checkpoint-1")
    if change == "checkpoint":
        (folder / name / "optimizer.pt").unlink()
    elif change == "link":
        (folder / name).rename(tmp_path / "disk")
        (folder / name).symlink_to(tmp_path / "disk")
    else:
        (folder / name).write_text("mine")
    before = contents(folder)
    common = [word for one in ("model_name_or_path", "train_data_path") for word in (f"--{one}", record["common"][one])]
    said = refused(main_train.main, *common, "--output_dir", str(folder), *OVER)
    assert f"holds {name!r}, which no run of this project wrote, or which was changed since" in said
    assert contents(folder) == before


def test_going_on_from_elsewhere_writes_over_no_weights_of_others(copied, refused, tmp_path):
    folder = copied("--max_steps", "2", *STEPS)
    record = json.loads((folder / "train_args.json").read_text())["common"]
    write(tmp_path / "theirs", **{"adapter_model.safetensors": "mine"})
    paths = [word for name in ("model_name_or_path", "train_data_path") for word in (f"--{name}", record[name])]
    resume = ["--resume_from_checkpoint", str(folder / "checkpoint-1"), *OVER]
    said = refused(main_train.main, *paths, "--output_dir", str(tmp_path / "theirs"), *resume)
    assert "holds 'adapter_model.safetensors', which no run of this project wrote" in said
    assert contents(tmp_path / "theirs") == {"adapter_model.safetensors": b"mine"}


def test_a_run_through_a_symbolic_link(train, copied, tmp_path, refused, tiny_models, rows_file):
    folder = copied("--max_steps", "1", *STEPS)
    folder.rename(tmp_path / "real")
    folder.symlink_to(tmp_path / "real")
    assert train("--max_steps", "2", *OVER) == folder  # the same folder
    assert folder.is_symlink() and not checkpoints_of(tmp_path / "real")
    assert json.loads((tmp_path / "real" / "trainer_state.json").read_text())["global_step"] == 2
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file]
    said = refused(main_train.main, *flags, "--output_dir", str(tmp_path / "nowhere"))
    assert "is a symbolic link to" in said and "which does not exist" in said
