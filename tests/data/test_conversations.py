"""Row formats become messages; malformed rows are described."""

import pytest

from utils.data.bad_rows import BadRow, EmptyRow
from utils.data.conversations import to_messages, to_text

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Hi", "output": "Hello"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": None, "system": None, "history": None, "output": "Hello"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": "there", "output": "Hello"}, [{**USER, "content": "Hi\nthere"}, ANSWER]),
        ({"instruction": "Hi", "system": "Be kind.", "output": "Hello"}, [SYSTEM, USER, ANSWER]),
        ({"instruction": "Hi", "history": [["Hi", "Hello"]], "output": "Hello"}, [USER, ANSWER, USER, ANSWER]),
        ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, [USER, ANSWER]),
        ({"conversations": [USER, ANSWER], "system": "Be kind."}, [SYSTEM, USER, ANSWER]),
    ],
)
def test_formats(row, messages):
    assert to_messages(row) == messages


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "Hi"}, "no field 'output'"),
        ({"output": "Hello"}, "no field 'instruction'"),
        ({"instruction": None, "output": "Hello"}, "null in 'instruction'"),
        ({"instruction": "Hi", "output": 3}, "a number in 'output'"),
        ({"instruction": "Hi", "output": ["Hello"]}, "a list in 'output'"),
        ({"instruction": "Hi", "output": True}, "true or false in 'output'"),
        ({"instruction": " ", "output": "Hello"}, "empty instruction"),
        ({"instruction": "Hi", "output": "Hello \ud800"}, "half a Unicode character"),
        ({"instruction": "Hi", "history": "none", "output": "Hello"}, "'history'"),
        ({"instruction": "Hi", "history": [["Hi"]], "output": "Hello"}, "turn 1"),
        ({"messages": []}, "empty list"),
        ({"messages": "Hi"}, "not a list of turns"),
        ({"messages": [USER]}, "no answer"),
        ({"messages": [{"role": "robot", "content": "Hi"}, ANSWER]}, "turn 1 has the role 'robot'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "turn 2 has null in 'content'"),
        ({"messages": [USER, "Hello"]}, "turn 2 is a text"),
        ({"question": "Hi"}, "no field 'answer' or 'response'"),
        ({"notes": "Hi"}, "['notes']"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "dpo"),
        ({"text": "Hi"}, "pretrain"),
        ([1], "is a list"),
        (None, "is null"),
    ],
)
def test_malformed_rows_say_what_is_wrong(row, said):
    with pytest.raises(BadRow, match=None) as error:
        to_messages(row)
    assert said in str(error.value) and not isinstance(error.value, EmptyRow)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi", "output": ""},
        {"instruction": "Hi", "output": " \n"},
        {"messages": [USER, {"role": "assistant", "content": ""}]},
    ],
)
def test_an_empty_answer_is_its_own_kind(row):
    with pytest.raises(EmptyRow):
        to_messages(row)


def test_texts():
    assert to_text({"text": "Hi"}) == "Hi"
    for row in ({"text": None}, {"txt": "Hi"}, "Hi"):
        with pytest.raises(BadRow):
            to_text(row)
