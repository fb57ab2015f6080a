"""The tensors of a step, against literal ones."""

import pytest

from utils.data.collate import build_collator, build_pair_collator, build_trl_pair_collator

ROWS = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "source": [4]},
    {"input_ids": [4, 5], "labels": [-100, 5], "source": [2]},
]
PAIR = {
    "prompt_ids": [1, 2], "chosen_ids": [3, 4], "chosen_labels": [3, 4], "rejected_ids": [5], "rejected_labels": [5],
    "source": [7],
}  # fmt: skip


TENSORS = ("input_ids", "labels", "attention_mask", "position_ids", "row", "completion_mask")


def lists(batch):
    return {name: batch[name].tolist() for name in TENSORS if name in batch} | {"source": batch["source"]}


def test_padded_rows():
    assert lists(build_collator(0, padding_free=False)(ROWS)) == {
        "input_ids": [[1, 2, 3], [4, 5, 0]], "labels": [[-100, 2, 3], [-100, 5, -100]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]], "source": [4, 2],
    }  # fmt: skip


def test_concatenated_rows():
    batch = lists(build_collator(0, padding_free=True)(ROWS))
    assert batch["input_ids"] == [[1, 2, 3, 4, 5]] and batch["position_ids"] == [[0, 1, 2, 0, 1]]
    assert [label for label in batch["labels"][0] if label != -100] == [2, 3, 5] and batch["source"] == [4, 2]


def test_rows_without_a_source_only_fill_a_step_up():
    filler = {"input_ids": [0], "labels": [-100], "source": []}
    collate = build_collator(0, padding_free=False)
    assert lists(collate([filler, ROWS[1]])) == lists(collate([ROWS[1]]))
    assert lists(collate([filler, filler]))["input_ids"] == [[0]]


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_pair_becomes_two_rows(padding_free):
    batch = lists(build_pair_collator(0, padding_free)([PAIR]))
    if padding_free:
        assert batch["input_ids"] == [[1, 2, 3, 4, 1, 2, 5]] and batch["row"] == [[0, 0, 0, 0, 1, 1, 1]]
        assert [label for label in batch["labels"][0] if label != -100] == [3, 4, 5]
    else:
        assert batch["input_ids"] == [[1, 2, 3, 4], [1, 2, 5, 0]] and batch["row"] == [[0] * 4, [1] * 4]
        assert batch["labels"] == [[-100, -100, 3, 4], [-100, -100, 5, -100]]
    assert batch["source"] == [7]


def test_of_an_answer_of_several_turns_only_labelled_tokens_are_in_trls_mask():
    batch = lists(build_trl_pair_collator(0)([{**PAIR, "chosen_labels": [-100, 4]}]))
    assert batch["input_ids"] == [[1, 2, 3, 4], [1, 2, 5, 0]]
    assert batch["completion_mask"] == [[0, 0, 0, 1], [0, 0, 1, 0]]
