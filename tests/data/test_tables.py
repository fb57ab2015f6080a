"""CSV and Parquet: headers, empty cells, columns of objects."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_rows
from test_official import TOOLS

from utils.data.bad_rows import BadRow
from utils.data.conversations import to_messages
from utils.data.files import read_rows
from utils.data.row_types import CONVERSATION

USER, ANSWER = {"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Pear"}


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


def test_a_csv_cell_can_hold_messages(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps([USER, ANSWER])]])
    assert [to_messages(row.value) for row in read_rows(str(path))] == [[USER, ANSWER]]


def booking(arguments):
    call = {"id": "abcdef123", "type": "function", "function": {"name": "book_table", "arguments": arguments}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "abcdef123", "name": "book_table", "content": "done"},
            ANSWER]  # fmt: skip
    return {"messages": turns, "tools": TOOLS}


def test_nulls_that_a_table_pads_with_are_not_trained(tmp_path):
    """The same rows from JSON and from Parquet are the same messages; a null of a JSON file stays."""
    rows = [booking({"people": 4}), booking({"place": "Lark", "deep": {"a": 1}})]
    rows[1]["tools"] = [{"type": "function", "function": {"name": "book_table", "description": "Other."}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    padded = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert padded[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["place"] is None
    read = [to_messages(raw.value) for raw in read_rows(str(tmp_path / "rows.parquet"))]
    assert read == [to_messages(row) for row in rows]
    kept = next(read_rows(write_rows(tmp_path / "a.jsonl", [booking({"people": None})])))
    assert to_messages(kept.value)[1]["tool_calls"][0]["function"]["arguments"] == {"people": None}
