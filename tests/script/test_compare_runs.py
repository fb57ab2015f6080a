"""Several runs in one picture, and a table of what differs."""

import errno
import json
import shutil
from pathlib import Path

import pytest

import utils.script.compare_runs as compare
from utils.run.compare import differing, label_runs, read_run, table
from utils.script.compare_runs import main, split_folders


def write_run(
    folder, learning_rate=1e-3, steps=4, planned=4, loss=2.0, state="trainer_state.json", data="/data/a/rows.jsonl"
):
    """A run's folder, as far as it is compared."""
    history = [{"step": s, "loss": loss / s} for s in range(1, steps + 1)]
    history += [{"step": s, "eval_loss": loss / s + (s == steps)} for s in range(1, steps + 1)]
    if state == "trainer_state.json":
        history.append({"step": steps, "train_runtime": 12.5})
        record = {
            "common": {"train_data_path": data, "lora_rank": 16, "output_dir": str(folder)},
            "trainer": {"learning_rate": learning_rate, "seed": 42, "output_dir": str(folder)},
            "versions": {"torch": "2"},
            "base": {"path": "b", "fingerprint": "f"},
            "data": {"train": {"files": [{"file": data, "sha256": "0" * 64}]}},
        }
        folder.mkdir(parents=True)
        (folder / "train_args.json").write_text(json.dumps(record))
    (folder / state).parent.mkdir(parents=True, exist_ok=True)
    (folder / state).write_text(json.dumps({"log_history": history, "global_step": steps, "max_steps": planned}))
    return str(folder)


def cells(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines}


def test_only_what_differs_is_in_the_table(tmp_path):
    runs = [read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", learning_rate=2e-3, loss=3.0))]
    found = cells(table(["a", "b"], runs))
    assert found == {
        "": ["a", "b"],
        "---": ["---", "---"],
        "steps": ["4", "4"],
        "last training loss": ["0.5000", "0.7500"],
        "last evaluation loss": ["1.5000", "1.7500"],
        "best evaluation loss": ["0.6667 (step 3)", "1.0000 (step 3)"],
        "training time": ["12.5 s", "12.5 s"],
        "learning_rate": ["0.001", "0.002"],
    }


def test_paths_are_shown_from_where_they_part(tmp_path):
    runs = [read_run(write_run(tmp_path / name, data=f"/home/x/{name}/rows.jsonl")) for name in "ab"]
    assert differing(runs) == {"train_data_path": ["a/rows.jsonl", "b/rows.jsonl"]}


def change(folder, name="train_args.json", **parts):
    """Changes a file of a run; a dictionary is added to the one that is there."""
    file = Path(folder) / name
    told = json.loads(file.read_text())
    for part, value in parts.items():
        told[part] = told[part] | value if isinstance(value, dict) and part in told else value
    file.write_text(json.dumps(told))
    return folder


def test_a_setting_that_a_task_does_not_have_is_a_dash_and_no_difference_where_it_is_none(tmp_path):
    a, b, c = (write_run(tmp_path / name) for name in "abc")
    change(a, trainer={"packing": None, "max_steps": None})
    change(b, trainer={"beta": 0.1, "loss_type": None, "max_steps": 7})
    change(c, trainer={"beta": None, "max_steps": None}, base={"fingerprint": None}, start={})
    found = differing([read_run(folder) for folder in (a, b, c)])
    assert found == {
        "max_steps": ["none", "7", "none"], "beta": ["–", "0.1", "none"], "weights of the base": ["f", "f", "–"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "hashes", "listed"),
    [
        (["data/base", "/home/x/data/base"], "ff", False),
        (["./data/base/", "/home/x/data/base"], "ff", False),
        (["../data/base", "/home/x/data/base"], "ff", False),
        (["data/base", "/home/x/data/base"], "fg", True),
        (["data/base", "/home/x/data/base"], [None, None], True),  # nothing tells that they are the same
        (["data/base", "/home/x/data/another"], "ff", True),
        (["/home/y/data/base", "/home/x/data/base"], "ff", True),
    ],
)
def test_the_same_base_by_a_relative_and_an_absolute_path_is_no_difference(tmp_path, paths, hashes, listed):
    runs = []
    for name, path, found in zip("ab", paths, hashes, strict=True):
        folder = change(write_run(tmp_path / name), base={"path": path, "fingerprint": found},
                        common={"model_name_or_path": path}, adapter={"path": path, "fingerprint": found},
                        data={"train": {"files": [{"file": path, "sha256": found}]}})  # fmt: skip
        runs.append(read_run(change(folder, common={"adapter_name_or_path": path, "train_data_path": path})))
    found = differing(runs)
    names = {"model_name_or_path", "adapter_name_or_path", "train_data_path"}
    assert names & found.keys() == (names if listed else set())
    assert ("weights of the base" in found) == (hashes[0] != hashes[1])


def test_the_time_of_a_resumed_run_says_that_it_is_its_last_parts(tmp_path):
    whole, resumed = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    change(resumed, trainer={"resume_from_checkpoint": str(tmp_path / "b" / "checkpoint-2")})
    found = cells(table(["a", "b"], [read_run(whole), read_run(resumed)]))
    assert found["training time"] == ["12.5 s", "12.5 s (since it was resumed)"]


@pytest.mark.parametrize(
    "damage",
    [
        {"trainer": [1]}, {"common": "x"}, {"trainer": 3, "common": None, "base": [1], "data": "x"},
        {"data": {"train": [1]}}, {"data": {"train": {"files": 3}}}, {"data": {"train": {"files": [{"file": "x"}, 4]}}},
        {"start": "python"}, {"base": "b"}, {"adapter": 1}, {"data": {"train": {"files": [{"sha256": 5}]}}},
    ],
)  # fmt: skip
def test_a_part_of_a_record_that_is_damaged_is_passed_over(tmp_path, damage, capsys):
    a, b = write_run(tmp_path / "a"), change(write_run(tmp_path / "b"), trainer={"seed": 7}, common={"lora_rank": 8})
    file = tmp_path / "b" / "train_args.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    main([a, b, "--output", str(tmp_path / "compare.png")])
    found = cells(capsys.readouterr().out)
    assert found["lora_rank"] == ["16", "–" if "common" in damage else "8"]
    assert found["seed"] == ["42", "–" if "trainer" in damage else "7"]


def test_a_record_of_which_nothing_can_be_read_is_as_none(tmp_path, capsys):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", learning_rate=2e-3)
    (tmp_path / "b" / "train_args.json").write_text('{"trainer": [1]}')
    main([a, b, "--output", str(tmp_path / "compare.png")])
    said = capsys.readouterr().out
    assert "learning_rate" not in said and "has no settings to compare" in said


def test_what_is_damaged_of_a_history_is_passed_over(tmp_path, capsys, refused):
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


def test_a_picture_that_cannot_be_written_is_told_with_the_remedy(tmp_path, refused, monkeypatch):
    folders = [write_run(tmp_path / name) for name in "ab"]
    below_a_file = str(tmp_path / "a" / "train_args.json" / "x.png")
    for path in ("/proc/x.png", str(tmp_path / ("x" * 300 + ".png")), below_a_file):
        said = refused(main, *folders, "--output", path)
        assert f"--output {path!r} cannot be written" in said and "give a file in an existing folder" in said

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compare, "plot_runs", full)
    assert "No space left on device" in refused(main, *folders, "--output", str(tmp_path / "x.png"))


def test_a_run_with_nothing_but_checkpoints_is_read_from_the_newest(tmp_path):
    write_run(tmp_path / "run", steps=9, planned=40, state="checkpoint-9/trainer_state.json")
    write_run(tmp_path / "run", steps=10, planned=40, state="checkpoint-10/trainer_state.json")
    run = read_run(str(tmp_path / "run"))
    assert run.step == 10 and run.record == {}
    found = cells(table(["run", "whole"], [run, read_run(write_run(tmp_path / "whole"))]))
    assert found["steps"] == ["10 of 40 (stopped)", "4"] and found["training time"] == ["–", "12.5 s"]


def test_the_history_of_a_stop_is_taken_where_it_is_longer(tmp_path):
    folder = write_run(tmp_path / "run", steps=3, planned=40)
    assert read_run(folder).step == 3
    write_run(tmp_path / "run", steps=5, planned=40, state="checkpoint-5/trainer_state.json")
    assert read_run(folder).step == 5


def test_labels_are_unique_where_names_coincide(tmp_path):
    a, b = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert label_runs([a, tmp_path / "b" / "other"]) == ["run", "other"]
    assert label_runs([a, b]) == ["a/run", "b/run"]
    assert len(set(label_runs([tmp_path / "x/y/run", tmp_path / "z/y/run", tmp_path / "run"]))) == 3


def test_folders_and_flags_in_any_order():
    words = ["a", "b", "--smooth", "0.5", "c", "--output=x.png", "d"]
    assert split_folders(words) == (["a", "b", "c", "d"], ["--smooth", "0.5", "--output=x.png"])


def test_the_command_draws_and_prints(tmp_path, capsys, monkeypatch):
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


def test_a_picture_is_replaced_only_when_told(tmp_path, refused):
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
def test_two_folders_at_least_and_each_once(tmp_path, refused, folders, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    said = refused(main, *folders)
    assert "given twice" in said if len(folders) == 2 else "give at least two" in said


def test_a_state_that_is_cut_off_is_passed_over(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    write_run(tmp_path / "run", steps=5, state="checkpoint-5/trainer_state.json")
    state = tmp_path / "run" / "checkpoint-5" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    assert read_run(folder).step == 3


def test_runs_as_they_are_made(train, tmp_path, capsys):
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
