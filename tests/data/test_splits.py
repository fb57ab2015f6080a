"""A folder stands for its training or validation split, as `datasets` reads the names."""

from pathlib import Path

import pytest

from utils.data.files import files_left_out, find_files, read_rows

ROWS = [{"messages": [{"role": "user", "content": f"Q{i}\n"}, {"role": "assistant", "content": "A"}]} for i in range(3)]

TRAIN, EVAL = "--train_data_path", "--eval_data_path"


@pytest.fixture
def folder(tmp_path):
    def make(*names):
        for name in names:
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        return str(tmp_path / "set")

    return make


def names_of(folder, flag):
    files, problems = find_files(folder, flag)
    assert not problems
    return [file.removeprefix(f"{folder}/") for file in files]


SHARDS = [f"data/{split}-0000{i}-of-00002.parquet" for split in ("test", "train", "validation") for i in range(2)]


@pytest.mark.parametrize(
    ("names", "train", "held_back"),
    [
        ([*SHARDS, "README.md", "dataset_infos.json"], SHARDS[2:4], SHARDS[4:]),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["train/a.jsonl", "train/test_cases.jsonl", "dev/b.jsonl"], ["train/a.jsonl", "train/test_cases.jsonl"],
         ["dev/b.jsonl"]),
        (["sft_train.jsonl", "sft-val.json"], ["sft_train.jsonl"], ["sft-val.json"]),
        (["rows.jsonl", "more/eval.jsonl"], ["rows.jsonl"], ["more/eval.jsonl"]),
        (["contest.jsonl", "trained.jsonl", "latest.csv"], ["contest.jsonl", "latest.csv", "trained.jsonl"], None),
    ],
)  # fmt: skip
def test_a_folder_is_trained_on_without_its_test_split(folder, names, train, held_back):
    made = folder(*names)
    assert names_of(made, TRAIN) == train
    assert names_of(made, EVAL) == (train if held_back is None else held_back)
    for flag, taken in ((TRAIN, train), (EVAL, held_back or train)):
        data = [name for name in names if not name.endswith(("README.md", "infos.json"))]
        lines = files_left_out(made, flag)
        assert len(lines) == (len(data) > len(taken))
        assert all(f" {name} (" in lines[0] for name in set(data) - set(taken))


def test_files_of_other_kinds_are_named(folder):
    made = folder("rows.jsonl", "more/rows.xml", "notes.txt", ".hidden.txt", "README.md", "dataset_infos.json")
    (line,) = files_left_out(made, TRAIN)
    assert ": more/rows.xml, notes.txt; " in line
    (line,) = files_left_out(made, TRAIN, (".jsonl", ".txt"))
    assert ": more/rows.xml; " in line
    many = folder(*(f"many/{number}.xml" for number in range(12)), "many/rows.jsonl") + "/many"
    assert files_left_out(many, TRAIN)[0].split("; ")[0].endswith(" and 2 more")


def test_the_names_are_read_as_datasets_reads_them(folder):
    """Against `datasets`' own patterns, where all files of a folder are named after splits."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    sets = (SHARDS, ["a_train.csv", "testing.csv", "dev-1.csv"], ["val/x.csv", "training/y.csv"])
    for place, names in enumerate(sets):
        made = folder(*(f"{place}/{name}" for name in names)) + f"/{place}"
        theirs = DataFilesDict.from_patterns(get_data_patterns(made), base_path=made)
        assert find_files(made, TRAIN)[0] == sorted(theirs["train"])
        assert find_files(made, EVAL)[0] == sorted(theirs["validation"])


@pytest.mark.parametrize(
    ("flag", "names", "said"),
    [
        (TRAIN, ["test.jsonl"], "holds no file of the train split, only of: test"),
        (EVAL, ["train.jsonl", "more.jsonl"], "holds no file of the validation split, only of: train"),
        (TRAIN, ["d/train_gen-00000-of-00001.csv", "d/train_sft-00000-of-00001.csv", "d/test_sft-00000-of-00001.csv"],
         "holds several sets of that split (train_gen, train_sft); name one: "),
    ],
)  # fmt: skip
def test_a_folder_without_the_split_that_is_needed_is_refused(folder, flag, names, said):
    files, (problem,) = find_files(folder(*names), flag)
    assert not files and said in str(problem)


def test_a_folder_of_save_to_disk_is_read_by_split_without_its_caches(tmp_path):
    from datasets import Dataset, DatasetDict, load_from_disk

    rows = [{"instruction": f"{number}?", "output": str(number)} for number in range(5)]
    train = Dataset.from_list(rows).shuffle(seed=3)  # an order of its own, which save_to_disk writes out
    train.save_to_disk(tmp_path / "rows", num_shards=2)
    load_from_disk(tmp_path / "rows").map(
        lambda row: {"output": "changed"}, cache_file_name=str(tmp_path / "rows/cache-1.arrow")
    )
    DatasetDict(train=train, test=Dataset.from_list(rows[:1])).save_to_disk(tmp_path / "both")
    for name in ("rows", "both"):
        files, problems = find_files(str(tmp_path / name), TRAIN)
        assert not problems and files_left_out(str(tmp_path / name), TRAIN) == (
            [] if name == "rows" else [f"{TRAIN} {str(tmp_path / name)!r} takes the training split; left out: "
                                       "test/data-00000-of-00001.arrow (test)"])  # fmt: skip
        read = [raw for file in files for raw in read_rows(file)]
        assert [raw.value for raw in read] == list(train) and {raw.problem for raw in read} == {None}
    assert [Path(file).parent.name for file in find_files(str(tmp_path / "both"), EVAL)[0]] == ["test"]
