"""The command `compare_runs`: the picture, the printed table, and what it refuses."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from run_records import cells, change, write_run

import utils.script.compare_runs as compare
from utils.script.compare_runs import main, split_folders


@pytest.mark.parametrize(
    "damage",
    [
        {"trainer": [1]}, {"common": "x"}, {"trainer": 3, "common": None, "base": [1], "data": "x"},
        {"data": {"train": [1]}}, {"data": {"train": {"files": 3}}}, {"data": {"train": {"files": [{"file": "x"}, 4]}}},
        {"start": "python"}, {"base": "b"}, {"adapter": 1}, {"data": {"train": {"files": [{"sha256": 5}]}}},
    ],
)  # fmt: skip
def test_damaged_parts_of_a_record_are_skipped(tmp_path, damage, capsys):
    a, b = write_run(tmp_path / "a"), change(write_run(tmp_path / "b"), trainer={"seed": 7}, common={"lora_rank": 8})
    file = tmp_path / "b" / "train_args.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    main([a, b, "--output", str(tmp_path / "compare.png")])
    found = cells(capsys.readouterr().out)
    assert found["lora_rank"] == ["16", "–" if "common" in damage else "8"]
    assert found["seed"] == ["42", "–" if "trainer" in damage else "7"]


def test_an_unreadable_record_counts_as_none(tmp_path, capsys):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", learning_rate=2e-3)
    (tmp_path / "b" / "train_args.json").write_text('{"trainer": [1]}')
    main([a, b, "--output", str(tmp_path / "compare.png")])
    said = capsys.readouterr().out
    assert "learning_rate" not in said and "has no settings to compare" in said


def test_damaged_entries_of_a_history_are_skipped(tmp_path, capsys, refused):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for folder in (a, b):
        state = json.loads((Path(folder) / "trainer_state.json").read_text())
        more = [{"eval_loss": 0.1, "loss": 9.0}, {"step": "x", "loss": 9.0}, {"step": None, "eval_loss": 0.1}, 3,
                {"step": 4, "loss": "x", "eval_loss": "x", "eval_rewards/accuracies": None, "train_runtime": "x"},
                {"step": 4, "learning_rate": [1]}]  # fmt: skip
        change(folder, "trainer_state.json", log_history=state["log_history"] + more, max_steps=None)
    main([a, b, "--output", str(tmp_path / "compare.png")])
    found = cells(capsys.readouterr().out)
    assert found["steps"] == ["4", "4"] and found["last training loss"] == ["0.5000", "0.5000"]
    assert found["best evaluation loss"] == ["0.6667 (step 3)"] * 2 and found["training time"] == ["12.5 s"] * 2
    change(b, "trainer_state.json", log_history=more[:4])
    said = refused(main, a, b, "--output", str(tmp_path / "other.png"))
    assert f"{b!r} logged nothing" in said and "leave it out" in said


def test_a_picture_that_cannot_be_written_is_reported_with_the_remedy(tmp_path, refused, monkeypatch):
    folders = [write_run(tmp_path / name) for name in "ab"]
    below_a_file = str(tmp_path / "a" / "train_args.json" / "x.png")
    for path in ("/proc/x.png", str(tmp_path / ("x" * 300 + ".png")), below_a_file):
        said = refused(main, *folders, "--output", path)
        assert f"--output {path!r} cannot be written" in said and "give a file in an existing folder" in said

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compare, "plot_runs", full)
    assert "No space left on device" in refused(main, *folders, "--output", str(tmp_path / "x.png"))


def test_folders_and_flags_in_any_order():
    words = ["a", "b", "--smooth", "0.5", "c", "--output=x.png", "d"]
    assert split_folders(words) == (["a", "b", "c", "d"], ["--smooth", "0.5", "--output=x.png"])


def test_the_command_draws_and_prints(rendered, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", learning_rate=0.5)
    drawn = []
    plot = compare.plot_runs
    monkeypatch.setattr(compare, "plot_runs", lambda runs, *more: (drawn.append((runs, *more)), plot(runs, *more))[1])
    main(["a", "b/", "--smooth", "0.5"])
    (runs, path, smooth), said = drawn[0], capsys.readouterr().out
    assert list(runs) == ["a", "b"] and str(path) == "compare.png" and smooth == 0.5
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "| learning_rate | 0.001 | 0.5 |" in said and "written: compare.png" in said


def test_a_picture_is_replaced_only_with_overwrite(tmp_path, refused):
    folders = [write_run(tmp_path / name) for name in "ab"]
    picture = tmp_path / "mine.png"
    picture.write_text("precious")
    assert "--overwrite true" in refused(main, *folders, "--output", str(picture))
    assert picture.read_text() == "precious"
    main([*folders, "--output", str(picture), "--overwrite", "true"])
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_all_problems_come_at_once(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "output" / "sft-1")
    silent = write_run(tmp_path / "silent")
    (tmp_path / "silent" / "trainer_state.json").write_text('{"log_history": [], "global_step": 0}')
    said = refused(main, str(tmp_path / "output" / "sft-2"), str(tmp_path / "empty"), str(tmp_path / "output"), silent,
                   "--smooth", "1", "--output", "x.jpg", "--outptu", "y")  # fmt: skip
    for text in (
        "sft-2' is not a folder. Did you mean", "sft-1'?", "empty' holds no run: a run has train_args.json",
        f"Runs in it: {tmp_path / 'output' / 'sft-1'}", "silent' logged nothing", "--smooth 1.0 is not allowed",
        "'x.jpg' is not a .png", "Did you mean '--output'",
    ):  # fmt: skip
        assert text in said, text


@pytest.mark.parametrize("folders", [[], ["a"], ["a", "a"]])
def test_at_least_two_different_folders(tmp_path, refused, folders, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    said = refused(main, *folders)
    assert "given twice" in said if len(folders) == 2 else "give at least two" in said


def test_two_real_runs(train, tmp_path, capsys):
    """Two real ones, of which one lost its end."""
    flags = ["--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "2"]
    a, b = train(*flags, output="a"), train(*flags, "--lora_rank", "4", "--learning_rate", "1e-2", output="b")
    for name in ("train_args.json", "trainer_state.json"):
        shutil.move(b / name, tmp_path / name)
    (tmp_path / "train_args.json").rename(b / "train_args.json.part")
    capsys.readouterr()
    main([str(a), str(b), "--output", str(tmp_path / "compare.png")])
    found = cells(capsys.readouterr().out)
    assert found[""] == ["a", "b"] and found["lora_rank"] == ["16", "4"]
    assert set(found) - {"", "---"} == {"steps", "last training loss", "training time", "lora_rank", "learning_rate"}
