"""JSON in its shapes, and one sentence for what cannot be read."""

import json

import pytest

from utils.data.bad_rows import BadRow
from utils.data.conversations import to_messages
from utils.data.files import read_rows

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
