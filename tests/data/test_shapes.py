"""JSON in its shapes, folders with splits, one file by several spellings, and one sentence for what cannot be read."""

import json

import pytest
import tiny
from conftest import write_rows

from utils.data.conversations import BadRow, to_messages
from utils.data.files import files_left_out, find_files, read_rows
from utils.data.row_types import CONVERSATION

TRAIN, EVAL = "--train_data_path", "--eval_data_path"
ROWS = [{"messages": [{"role": "user", "content": f"Q{i}\n"}, {"role": "assistant", "content": "A"}]} for i in range(3)]
SHAPES = {
    "an array": json.dumps(ROWS),
    "an array over lines": json.dumps(ROWS, indent=2),
    "an array, a row a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "wrapped": json.dumps({"version": "1.0", "data": ROWS}),
    "wrapped over lines": json.dumps({"version": "1.0", "data": ROWS}, indent=2),
    "one after another": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "one after another, close": "".join(json.dumps(row, indent=2) for row in ROWS),
    "a row a line": "\n".join(map(json.dumps, ROWS)),
    "a row a line, with gaps": "\n\n" + "\r\n\r\n".join(map(json.dumps, ROWS)) + "\r\n",
}


def read(path, text):
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return list(read_rows(str(path)))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_read_in_every_shape_of_json(tmp_path, shape, suffix):
    rows = read(tmp_path / f"rows{suffix}", SHAPES[shape])
    assert [row.value for row in rows] == ROWS and not any(row.problem for row in rows)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_file_may_be_one_row(tmp_path, suffix):
    for text in (json.dumps(ROWS[0]), json.dumps(ROWS[0], indent=2)):
        assert [row.value for row in read(tmp_path / f"rows{suffix}", text)] == ROWS[:1]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Sum up.", "output": "Two.", "items": [{"name": "a"}, {"name": "b"}]},
        {**ROWS[0], "data": [{"name": "a"}]},
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "examples": [{"name": "a"}]},
    ],
)
def test_a_row_with_a_list_named_like_a_wrapper_is_one_row(tmp_path, row):
    assert [one.value for one in read(tmp_path / "a.json", json.dumps(row, indent=1))] == [row]


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_one_message_where_a_list_belongs_is_named_as_such(tmp_path, name):
    turn = {"role": "user", "content": "Hi"} if name == "messages" else {"from": "human", "value": "Hi"}
    (row,) = read(tmp_path / "a.json", json.dumps({name: turn}, indent=1))
    with pytest.raises(BadRow, match=f"has one message in '{name}' where a list of them belongs"):
        to_messages(row.value)


def test_rows_one_after_another_are_told_by_the_line_they_begin_on(tmp_path):
    rows = read(tmp_path / "a.json", "\n" + "\n".join(json.dumps(row, indent=2) for row in ROWS))
    length = len(json.dumps(ROWS[0], indent=2).splitlines())
    assert [row.line for row in rows] == [2 + length * place for place in range(3)]


def test_rows_on_one_line_are_told_by_their_number(tmp_path):
    rows = read(tmp_path / "a.json", "".join(map(json.dumps, ROWS)))
    assert [(row.line, row.value) for row in rows] == list(enumerate(ROWS, 1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(ROWS, indent=2)[:-9], "is not JSON"),
        (json.dumps({"train": ROWS, "test": ROWS}), "is one object with rows in 'train' and 'test'; save each as a"),
        (json.dumps({"instruction": ["a", "b"], "output": ["c", "d"]}), "is one object of columns, not of rows"),
        (json.dumps({"output": {"0": "c", "1": "d"}}, indent=1), "is one object of columns, not of rows"),
        ('{\n "output": "a",\n "output": "b"\n}', "has the key 'output' twice in one object; keep one of them"),
        ('{"instruction": "a", "output": "a", "output": "b"}', "has the key 'output' twice in one object"),
        (json.dumps(ROWS[0], indent=1) + json.dumps(ROWS[1], indent=1)[:-3], "is the file written to its end?"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_what_cannot_be_read_is_one_sentence(tmp_path, suffix, text, said):
    problems = [row.problem for row in read(tmp_path / f"a{suffix}", text) if row.problem]
    assert len(problems) == 1 and said in problems[0]


def test_a_broken_line_among_whole_ones_is_not_told_as_an_end_of_the_file(tmp_path):
    rows = read(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b",}\n{"text": "c"}\n')
    assert [bool(row.problem) for row in rows] == [False, True, False]
    assert "is not JSON" in rows[1].problem and "written to its end" not in rows[1].problem


def test_an_empty_cell_is_no_value(tmp_path):
    path = tmp_path / "a.csv"
    header = "messages,instruction,input,output,system,history,tools,images,label\r\n"
    path.write_text(f"{header},Hi,,Hello,,,,,\r\n", newline="")
    (row,) = read_rows(str(path))
    wanted = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert to_messages(row.value) == wanted
    path.write_text('{"instruction": "Hi", "input": NaN, "output": NaN}')
    (row,) = read_rows(str(path.rename(tmp_path / "a.json")))
    with pytest.raises(BadRow, match=r"NaN \(an empty cell\) in 'output'"):
        to_messages(row.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"instruction,output,output\nHi,a,b\nHo,c,d\n", "has the column 'output' twice; keep one of them"),
        ("a.csv", b"instruction;output\nHi;a\nHo;c\n", "has the one column 'instruction;output'; save it with commas"),
        ("a.csv", b"instruction\toutput\nHi\ta\n", "save it with commas between the cells, not '\\t'"),
        ("a.csv", "instruction,output\nHi,a\nHo,b\n".encode("utf-16"), "is not UTF-8; save the file as UTF-8"),
        ("a.parquet", None, "has the column 'output' twice; keep one of them"),
    ],
)
def test_a_table_with_other_columns_than_it_seems_is_one_sentence(tmp_path, name, content, said):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / name
    if content is None:
        columns = [pyarrow.array([text]) for text in ("Hi", "a", "b")]
        pyarrow.parquet.write_table(pyarrow.table(columns, names=["instruction", "output", "output"]), file)
    else:
        file.write_bytes(content)
    (row,) = read_rows(str(file))
    assert said in row.problem and row.fatal


def test_spaces_in_a_header_and_an_index_of_pandas_are_no_fields(tmp_path):
    (tmp_path / "a.csv").write_text(",instruction, output\n0,Hi,Hello\n")
    (row,) = read_rows(str(tmp_path / "a.csv"))
    assert to_messages(row.value)[1]["content"] == "Hello" and CONVERSATION.unread(row.value) == []


# ------------------------------------------------------------------ folders and files


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


def test_a_folder_of_save_to_disk_says_what_it_is(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "rows")
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "both")
    for name, call in (("rows", "').to_parquet('rows.parquet')"), ("both", "')['train'].to_parquet('rows.parquet')")):
        files, (problem,) = find_files(str(tmp_path / name), TRAIN)
        assert not files and "is a folder of datasets' save_to_disk" in str(problem) and str(problem).endswith(call)


@pytest.mark.parametrize("spelling", ["{0}/./a.jsonl", "{0}/in/../a.jsonl", "{0}/link.jsonl", "{0}/hard.jsonl"])
def test_one_file_by_two_spellings_is_refused(tmp_path, spelling):
    (tmp_path / "in").mkdir()
    file = tmp_path / "a.jsonl"
    file.write_text("x")
    (tmp_path / "link.jsonl").symlink_to(file)
    (tmp_path / "hard.jsonl").hardlink_to(file)
    other = spelling.format(tmp_path)
    files, (problem,) = find_files(f"{file},{other}", TRAIN)
    assert files == [str(file)]
    assert f"names {str(file)!r} and {other!r}, which are one file, 2 times" in str(problem)


def test_a_file_found_in_two_ways_is_read_once(tmp_path):
    write_rows(tmp_path / "a.jsonl", tiny.ROWS)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert find_files(f"{tmp_path},{tmp_path}/*.jsonl", TRAIN) == ([str(tmp_path / "a.jsonl")], [])
