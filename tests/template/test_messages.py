"""Which answers are trained, and what a message held in the data."""

from utils.template.messages import (
    UNREAD_FIELD,
    RowNote,
    count_answers,
    is_empty_answer,
    is_trained_answer,
    original_fields,
    select_answers,
    unread_field_notes,
)

TURNS = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant", "user", "assistant")]


def test_the_last_answers_are_selected():
    for train_on, trained in (("all_turns", [1, 3, 5]), ("last_turn", [5]), (2, [3, 5]), ("2", [3, 5])):
        selected = select_answers(TURNS, train_on)
        assert [turn for turn, message in enumerate(selected) if is_trained_answer(message)] == trained
        assert count_answers(selected) == 3
    assert all("train" not in message for message in TURNS)


def test_an_answer_of_reasoning_or_of_a_call_is_not_empty():
    blank = {"role": "assistant", "content": " \n"}
    assert is_empty_answer(blank)
    assert not is_empty_answer({**blank, "tool_calls": [{}]}) and not is_empty_answer({**blank, "thinking": "Hm"})


def test_a_message_has_the_fields_of_the_data_again():
    message = {"role": "user", "content": "x", "tools": [1], "train": False, "extra": {"mood": "good"}}
    assert original_fields(message) == {"role": "user", "content": "x", "mood": "good"}


def test_fields_are_noted_once_and_metadata_is_not():
    assert unread_field_notes(["mood", "id", "mood"]) == [RowNote(UNREAD_FIELD, "mood (of a turn)")]
