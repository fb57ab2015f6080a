"""Reading finished and stopped runs, and the table of their differences."""

import pytest
from run_records import cells, change, write_run

from utils.run.compare import differing, label_runs, read_run, table


def test_the_table_has_only_differences(tmp_path):
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


def test_paths_are_shortened_to_where_they_differ(tmp_path):
    runs = [read_run(write_run(tmp_path / name, data=f"/home/x/{name}/rows.jsonl")) for name in "ab"]
    assert differing(runs) == {"train_data_path": ["a/rows.jsonl", "b/rows.jsonl"]}


def test_a_missing_setting_is_a_dash_and_equal_to_none(tmp_path):
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
def test_a_relative_and_an_absolute_path_of_one_base_are_equal(tmp_path, paths, hashes, listed):
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


def test_the_time_of_a_resumed_run_is_marked(tmp_path):
    whole, resumed = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    change(resumed, trainer={"resume_from_checkpoint": str(tmp_path / "b" / "checkpoint-2")})
    found = cells(table(["a", "b"], [read_run(whole), read_run(resumed)]))
    assert found["training time"] == ["12.5 s", "12.5 s (since it was resumed)"]


def test_a_run_with_only_checkpoints_is_read_from_the_newest(tmp_path):
    write_run(tmp_path / "run", steps=9, planned=40, state="checkpoint-9/trainer_state.json")
    write_run(tmp_path / "run", steps=10, planned=40, state="checkpoint-10/trainer_state.json")
    run = read_run(str(tmp_path / "run"))
    assert run.step == 10 and run.record == {}
    found = cells(table(["run", "whole"], [run, read_run(write_run(tmp_path / "whole"))]))
    assert found["steps"] == ["10 of 40 (stopped)", "4"] and found["training time"] == ["–", "12.5 s"]


def test_the_longer_history_of_a_stopped_run_is_used(tmp_path):
    folder = write_run(tmp_path / "run", steps=3, planned=40)
    assert read_run(folder).step == 3
    write_run(tmp_path / "run", steps=5, planned=40, state="checkpoint-5/trainer_state.json")
    assert read_run(folder).step == 5


def test_labels_are_unique(tmp_path):
    a, b = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert label_runs([a, tmp_path / "b" / "other"]) == ["run", "other"]
    assert label_runs([a, b]) == ["a/run", "b/run"]
    assert len(set(label_runs([tmp_path / "x/y/run", tmp_path / "z/y/run", tmp_path / "run"]))) == 3


def test_a_truncated_state_is_skipped(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    write_run(tmp_path / "run", steps=5, state="checkpoint-5/trainer_state.json")
    state = tmp_path / "run" / "checkpoint-5" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    assert read_run(folder).step == 3
