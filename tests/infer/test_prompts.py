"""Rows as prompts: every format, with and without its answer, and what is named."""

import json

import pytest
import tiny
from conftest import write_rows

from utils.data.bad_rows import BadRow
from utils.data.conversations import to_messages
from utils.data.pairs import to_pair
from utils.infer.prompts import read_prompts, to_prompt
from utils.runtime.errors import UserError

USER = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Hello"}
TOOLS = [{"type": "function", "function": {"name": "look"}}]


@pytest.mark.parametrize(("row", "messages", "reference"), [
    ({"instruction": "Hi"}, [USER], None),
    ({"instruction": "Hi", "output": ""}, [USER], None),
    ({"instruction": "Hi", "output": None}, [USER], None),
    ({"instruction": "Hi", "output": "Hello"}, [USER], "Hello"),
    ({"instruction": "Add.", "input": "1", "history": [["Hi", "Hello"]], "system": "Be brief."},
     [{"role": "system", "content": "Be brief."}, USER, SAID, {"role": "user", "content": "Add.\n1"}], None),
    ({"messages": [USER]}, [USER], None),
    ({"messages": [USER, SAID]}, [USER], "Hello"),
    ({"messages": [USER, SAID, USER]}, [USER, SAID, USER], None),
    ({"messages": [USER, SAID], "reference": "Good day"}, [USER], "Good day"),
    ({"messages": None, "prompt": "Hi"}, [USER], None),
    ({"messages": [USER], "system": "S"}, [{"role": "system", "content": "S"}, USER], None),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, [USER], "Hello"),
    ({"prompt": "Hi"}, [USER], None),
    ({"prompt": [USER], "system": "S"}, [{"role": "system", "content": "S"}, USER], None),
    ({"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}, [USER], "Hello"),
    ({"prompt": "Hi", "chosen": "", "reject": "No"}, [USER], None),
    ({"chosen": [USER, SAID], "rejected": [USER, {"role": "assistant", "content": "No"}]}, [USER], "Hello"),
])  # fmt: skip
def test_every_format(row, messages, reference):
    assert to_prompt(row) == (messages, None, reference)


def test_tools_and_their_messages_are_kept():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    turns = [USER, call, {"role": "tool", "content": "7", "name": "look"}]
    assert to_prompt({"messages": turns, "tools": TOOLS}) == (turns, TOOLS, None)
    assert to_prompt({"messages": [USER, call], "tools": TOOLS}) == ([USER], TOOLS, None)


@pytest.mark.parametrize(("rows", "read"), [(tiny.ROWS, to_messages), (tiny.PAIRS, to_pair)])
def test_what_is_trained_on_is_asked_for(rows, read):
    """The prompt is what the training readers see before the answer, and the reference is that answer."""
    for row in rows:
        messages, tools, reference = to_prompt(row)
        whole = read(row)
        whole = whole["prompt"] + whole["chosen"] if isinstance(whole, dict) else whole
        assert [*messages, {"role": "assistant", "content": reference}] == whole and tools is None


@pytest.mark.parametrize(("row", "told"), [
    ("Hi", "is a text, not an object"),
    ({"text": "Hi"}, "has the fields ['text']; expected"),
    ({"output": "Hello"}, "has the fields ['output']; expected"),
    ({"instruction": " "}, "has an empty instruction"),
    ({"instruction": 5}, "has a number in 'instruction'"),
    ({"messages": []}, "has an empty list in 'messages'"),
    ({"messages": [SAID]}, "has an answer and no prompt before it"),
    ({"messages": [USER, SAID, SAID]}, "ends with assistant"),
    ({"messages": [{"role": "system", "content": "S"}]}, "ends with system"),
    ({"messages": [{"role": "user", "content": " "}]}, "has an empty prompt"),
    ({"prompt": "Hi", "chosen": "Hello"}, "has no field 'rejected'"),
    ({"prompt": "Hi", "reference": 5}, "has a number in 'reference'"),
    ({"prompt": "Hi", "tools": {"name": "f"}}, "has an object in 'tools'"),
    ({"prompt": "Hi", "tools": [{"name": "\ud800"}]}, "JSON cannot hold"),
])  # fmt: skip
def test_what_is_no_prompt(row, told):
    with pytest.raises(BadRow) as error:
        to_prompt(row)
    assert told in str(error.value)


def test_files_in_order_and_problems_by_file_and_line(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", [{"prompt": "one"}, {"text": "no"}, {"prompt": "two", "tools": None}])
    with open(first, "a") as file:
        file.write('{"prompt": "cut off\n\n{"prompt": "three"}\n')
    second = tmp_path / "b.csv"
    second.write_text("instruction,output\nfour,4\n", encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps([{"prompt": "five"}]), encoding="utf-8")
    prompts, problems = read_prompts(f"{first},{tmp_path}", "--input")
    said = [(prompt.file, prompt.line, prompt.messages[0]["content"], prompt.reference) for prompt in prompts]
    assert said == [(first, 1, "one", None), (first, 3, "two", None), (first, 6, "three", None),
                    (str(second), 2, "four", "4"), (str(tmp_path / "c.json"), 1, "five", None)]  # fmt: skip
    assert (
        len(problems) == 2
        and str(problems[0]).startswith(f"{first}:2 has the fields")
        and f"{first}:4 is not JSON" in str(problems[1])
        and [(problem.file, problem.line) for problem in problems] == [(str(first), 2), (str(first), 4)]
    )


def test_a_parquet_table_has_every_column_in_every_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [USER, SAID]}, {"prompt": "Hi", "tools": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": None, "prompt": None} | row for row in rows]),
                                tmp_path / "rows.parquet")  # fmt: skip
    prompts, problems = read_prompts(str(tmp_path / "rows.parquet"), "--input")
    assert not problems and [(prompt.messages, prompt.reference) for prompt in prompts] == [
        ([USER], "Hello"),
        ([USER], None),
    ]


def test_a_file_that_is_missing_or_not_readable_to_its_end_is_no_row_to_leave_out(tmp_path):
    with pytest.raises(UserError, match="--input .*does not exist"):
        read_prompts(str(tmp_path / "no.jsonl"), "--input")
    (tmp_path / "cut.json").write_text('[{"prompt": "Hi"}, {"pro', encoding="utf-8")
    with pytest.raises(UserError, match="cut.json:1 is not JSON"):
        read_prompts(str(tmp_path / "cut.json"), "--input")


@pytest.mark.parametrize("mark", [{"weight": 0.5}, {"weight": 0}, {"train": False, "loss": 1}, {"train_on_turn": True}])
def test_marks_of_what_is_trained_are_ignored(mark):
    user, said = USER | mark, SAID | mark
    assert to_prompt({"messages": [user, said, user, said]}) == ([USER, SAID, USER], None, "Hello")
    turns = [{"from": "human", "value": "Hi"} | mark, {"from": "gpt", "value": "Hello"} | mark]
    assert to_prompt({"conversations": turns}) == ([USER], None, "Hello")
    assert to_prompt({"prompt": [user], "chosen": [said], "rejected": said}) == ([USER], None, "Hello")
    assert to_prompt({"messages": [user], "tools": [{"name": "f", **mark}]})[1] == [
        {"type": "function", "function": {"name": "f", **mark}}  # of a tool it is no mark
    ]
