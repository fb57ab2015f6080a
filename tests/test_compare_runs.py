"""Several runs in one picture, and a table of what differs."""

import json
import shutil

import pytest

import utils.script.compare_runs as compare
from utils.script.compare_runs import differing, label_runs, main, read_run, split_folders, table


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
        "training loss at last": ["0.5000", "0.7500"],
        "evaluation loss at last": ["1.5000", "1.7500"],
        "evaluation loss at best": ["0.6667 (step 3)", "1.0000 (step 3)"],
        "training time": ["12.5 s", "12.5 s"],
        "learning_rate": ["0.001", "0.002"],
    }


def test_paths_are_shown_from_where_they_part(tmp_path):
    runs = [read_run(write_run(tmp_path / name, data=f"/home/x/{name}/rows.jsonl")) for name in "ab"]
    assert differing(runs) == {"train_data_path": ["a/rows.jsonl", "b/rows.jsonl"]}


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
    assert set(found) - {"", "---"} == {"steps", "training loss at last", "training time", "lora_rank", "learning_rate"}
