"""Fields beside those that are read: refused where they matter, named once a file where their meaning is not known."""

import pytest
import tiny
from conftest import write_rows

from utils.data import row_types
from utils.data.bad_rows import BadRow, EmptyRow
from utils.data.conversations import to_messages, to_text
from utils.data.files import RawRow
from utils.data.pairs import to_pair
from utils.data.row_types import CONVERSATION, PLAIN_TEXT
from utils.evaluate.multiple_choice import read_choices
from utils.infer.prompts import to_prompt
from utils.template.messages import METADATA_FIELDS

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
CHAT, PLAIN = {"messages": [USER, ANSWER]}, {"instruction": "Hi", "output": "Hello"}
PAIR, TEXT = {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}, {"text": "Hi"}
READERS = {"chat": (to_messages, CHAT), "plain": (to_messages, PLAIN), "pair": (to_pair, PAIR), "text": (to_text, TEXT)}
LOST = {
    "images": ["cat.png"],
    "image": {"bytes": "x"},
    "videos": ["cat.mp4"],
    "audio": "cat.wav",
    "chat_template_kwargs": {"enable_thinking": False},
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("name", LOST)
def test_content_that_would_be_lost_is_refused_by_name(kind, name):
    read, row = READERS[kind]
    with pytest.raises(BadRow, match=f"has a field '{name}', which is not read: ") as error:
        read({**row, name: LOST[name]})
    assert not isinstance(error.value, EmptyRow)
    read({**row, name: None})
    read({**row, name: type(LOST[name])()})


@pytest.mark.parametrize("name", ["images", "chat_template_kwargs"])
def test_what_is_asked_of_a_model_is_whole_as_well(name):
    with pytest.raises(BadRow, match=f"has a field '{name}'"):
        to_prompt({**PLAIN, name: LOST[name]})
    row = {"question": "Which?", "choices": ["one", "two"], "answer": "A", name: LOST[name]}
    with pytest.raises(BadRow, match=f"has a field '{name}'"):
        read_choices(RawRow("a.jsonl", 1, row))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**CHAT, "conversations": OTHER}, "has 'conversations' beside 'messages', which is the conversation already"),
        ({**CHAT, "instruction": "X", "output": "Y"}, "has 'instruction' beside 'messages'"),
        ({**CHAT, "output": "Y"}, "has 'output' beside 'messages'"),
        ({**CHAT, "question": "X", "answer": "Y"}, "has 'question' and 'answer' beside 'messages', which is the"),
        (
            {**PLAIN, "question": "X", "answer": "Y"},
            "has a field 'question', which is not read and changes the question",
        ),
        ({**CHAT, "chosen": [USER, USER], "rejected": "Y"}, "has 'chosen' beside 'messages'"),
        ({**CHAT, "completion": [ANSWER]}, "has 'completion' beside 'messages'"),
        ({"conversations": OTHER, "output": "Y"}, "has 'output' beside 'conversations'"),
        ({**PLAIN, "rejected": "Y"}, "has 'rejected' beside 'output'"),
        ({**PLAIN, "response": "Y"}, "has 'response' beside 'output'"),
        ({**PLAIN, "reasoning": "I think."}, "has a field 'reasoning', which is not read"),
        ({**PAIR, "output": "Y"}, "has 'output' beside 'chosen'"),
        ({**PAIR, "prompt": [USER], "messages": [USER, USER]}, "has 'messages' beside 'prompt'"),
        *(
            ({**row, name: "I think."}, f"has a field '{name}', which is not read")
            for row in (PLAIN, CHAT, {"conversations": OTHER}, PAIR)
            for name in ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
        ),
        ({**PLAIN, "context": "Of pears.", "input": "Pears"}, "has 'context' beside 'input', and they differ"),
        ({"question": "Hi", "answer": "Ho", "context": "Of pears."}, "has a field 'context', which is not read and"),
        ({"question": "Hi", "answer": "A", "choices": ["Ho", "Hum"]}, "has a field 'choices', which is not read and"),
        ({**PAIR, "context": "Of pears."}, "has a field 'context', which is not read and changes the question"),
        ({**PLAIN, "system": "Be kind.", "system_prompt": "Be rude."}, "has 'system_prompt' beside 'system'"),
        ({**CHAT, "tools": [{"name": "f"}], "functions": [{"name": "g"}]}, "has 'functions' beside 'tools'"),
        ({"messages": [{**USER, "value": "Ho"}, ANSWER]}, "turn 1 has 'value' beside 'content', and they differ"),
        ({"conversations": [OTHER[0], {**OTHER[1], "content": "X"}]}, "turn 2 has 'content' beside 'value'"),
        ({"messages": [USER, {**ANSWER, "content": "", "value": "X"}]}, "turn 2 has 'value' beside 'content'"),
        ({**PLAIN, "label": 0}, "has 'label' 0, the mark of an answer that is not wanted"),
        ({**CHAT, "label": 0.0}, "has 'label' 0.0"),
        ({**PAIR, "label": "0"}, "has 'label' '0'"),
        ({**PLAIN, "label": False}, "has 'label' False, the mark of an answer that is not wanted"),
        ({**CHAT, "label": "False"}, "has 'label' 'False'"),
        ({**CHAT, "weight": 0}, "has 'weight' 0"),
        ({**PAIR, "weight": 0.5}, "has 'weight' 0.5"),
    ],
)
def test_a_second_conversation_and_marks_of_bad_answers_are_refused(row, said):
    with pytest.raises(BadRow) as error:
        (to_pair if "chosen" in row and "messages" not in row or "prompt" in row else to_messages)(row)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {**CHAT, "prompt": "Hi ", "prompt_id": "f0"},  # ultrachat_200k
        {**CHAT, "prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, USER]},  # ultrafeedback_binarized
        {**CHAT, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {**CHAT, "conversations": None, "instruction": "", "output": float("nan"), "images": []},
        {**PLAIN, "messages": None, "conversations": None, "label": True, "weight": 1},
        {"question": "Hi", "answer": "Hello", "context": "Hi\n"},
        {**PLAIN, "context": "", "label": 1, "thought": None},
        {**CHAT, "label": "1", "reasoning": ""},
        {**CHAT, "question": "Hi", "answer": "42"},  # the question once more, with the result to check an answer by
        {**CHAT, "answer": "42", "target": "42"},
        {"messages": [{**USER, "value": "Hi"}, {**ANSWER, "value": ""}]},
        {**PLAIN, "response": "Hello", "system": " ", "input": "\n", "tools": "", "history": float("nan")},
    ],
)
def test_what_only_repeats_or_holds_nothing_is_no_second_conversation(row):
    assert to_messages(row) == [USER, ANSWER]


def test_a_row_of_empty_columns_is_told_by_the_column_that_is_not_null():
    with pytest.raises(EmptyRow):
        to_messages({"messages": None, "conversations": None, "instruction": "Hi", "output": ""})


def test_unread_fields_are_those_neither_read_nor_descriptive():
    row = {**PLAIN, "id": 3, "source": "web", "score": 4.5, "notes": None, "hint": ""}
    assert CONVERSATION.unread(row) == ["score"]
    assert row_types.PAIR.unread({**PAIR, "margin": 2}) == ["margin"]
    assert PLAIN_TEXT.unread({**TEXT, "label": 0, "url": "x"}) == ["label"]
    assert not METADATA_FIELDS & {"messages", "output", "images", "label", "score"}


def test_a_file_names_its_unread_fields_once_and_the_doctor_too(train, tiny_models, tmp_path, capsys):
    from utils.script import doctor

    rows = [{**row, "score": 5, "id": place} for place, row in enumerate(tiny.ROWS)]
    data = write_rows(tmp_path / "scored.jsonl", rows)
    log = (train("--num_train_epochs", "1", data=data) / "train.log").read_text(encoding="utf-8")
    (line,) = [line for line in log.splitlines() if "not read" in line]
    assert "WARNING" in line and line.endswith(f"train data: {data}: fields not read: 'score' ({len(rows)} rows)")
    capsys.readouterr()
    doctor.main(["--model_name_or_path", tiny_models(), "--train_data_path", data])
    assert "FIELDS_UNREAD" in capsys.readouterr().out
