"""Which files of a folder a run wrote, and which of them another run may remove."""

import json

import pytest

from utils.storage.run_files import (
    PISSA_START,
    clear_run,
    foreign_files,
    holds_weights,
    remove_pissa_start,
    written_here,
)
from utils.storage.run_folder import mark_complete, mark_incomplete

FILES = {"config.json": "{}", "model.safetensors": "weights", "train.log": "log", "README.md": "card"}


def finished_run(folder):
    """A run's folder with the record that lists its files, and files of the user's own."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    record = {"trainer": {}, "files": written_here(folder)}
    (folder / "train_args.json").write_text(json.dumps(record))
    (folder / "notes.txt").write_text("mine")
    return folder


def test_only_names_that_a_run_writes_are_listed_with_their_sizes(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_text("12")
    (tmp_path / "model-1-of-2.safetensors").write_text("12")
    sizes = {name: len(text) for name, text in FILES.items()}
    assert written_here(tmp_path) == sizes | {"model-00001-of-00002.safetensors": 2}


def test_a_finished_run_has_no_foreign_files(tmp_path):
    assert foreign_files(finished_run(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer.json", "of another program"), ("model.safetensors", "weights of another size"),
     ("model-00001-of-00002.safetensors", "w")],
)  # fmt: skip
def test_added_files_and_resized_weights_are_foreign(name, text, tmp_path):
    (finished_run(tmp_path) / name).write_text(text)
    assert foreign_files(tmp_path) == [name]


def test_files_that_every_step_changes_and_resized_settings_are_the_runs(tmp_path):
    folder = finished_run(tmp_path)
    for name in ("train.log", "loss.png", "README.md", "config.json"):
        (folder / name).write_text("longer than it was before")
    assert foreign_files(folder) == []


def test_every_file_of_a_folder_that_no_run_wrote_is_foreign_but_a_readme(tmp_path):
    folder = finished_run(tmp_path)
    (folder / "train_args.json").unlink()
    assert foreign_files(folder) == ["config.json", "model.safetensors", "train.log"]
    finished_run(folder)
    (folder / "merged.json").write_text("{}")
    assert foreign_files(folder) == ["config.json", "model.safetensors", "train.log"]


def test_a_record_without_the_list_of_files_counts_all_of_them_as_the_runs(tmp_path):
    folder = finished_run(tmp_path)
    (folder / "train_args.json").write_text('{"trainer": {}}')
    (folder / "tokenizer.json").write_text("{}")
    assert foreign_files(folder) == []


def test_clearing_removes_what_the_run_wrote_and_nothing_else(tmp_path):
    folder = finished_run(tmp_path)
    (folder / "adapter_model.safetensors").write_text("of the user")
    done = folder / "checkpoint-2"
    mark_incomplete(done)
    (done / "weights").write_text("w")
    mark_complete(done, {})
    theirs = folder / "checkpoint-7"
    theirs.mkdir()
    (theirs / "weights").write_text("w")
    clear_run(folder, own_card=False)
    left = {"config.json", "README.md", "notes.txt", "adapter_model.safetensors", "checkpoint-7"}
    assert {path.name for path in folder.iterdir()} == left
    clear_run(folder, own_card=True)
    assert not (folder / "README.md").exists()


def test_weights_are_an_adapters_or_a_models(tmp_path):
    assert not holds_weights(tmp_path, adapter=True) and not holds_weights(tmp_path, adapter=False)
    (tmp_path / "adapter_model.safetensors").touch()
    assert holds_weights(tmp_path, adapter=True) and not holds_weights(tmp_path, adapter=False)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert holds_weights(tmp_path, adapter=False)


def test_the_start_of_a_pissa_run_is_removed_but_not_through_a_link(tmp_path):
    start = tmp_path / PISSA_START
    start.mkdir()
    (start / "adapter_model.safetensors").touch()
    remove_pissa_start(tmp_path)
    assert not start.exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "adapter_model.safetensors").touch()
    start.symlink_to(elsewhere)
    remove_pissa_start(tmp_path)
    assert (elsewhere / "adapter_model.safetensors").exists()
