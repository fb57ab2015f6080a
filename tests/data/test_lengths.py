"""Lengths of prepared rows from Arrow, against Python's `len`, for rows, pairs and a part of a dataset."""

from datasets import Dataset

from utils.data.lengths import list_lengths, sequence_lengths
from utils.data.row_types import CONVERSATION, PAIR
from utils.doctor.tokens import row_lengths
from utils.train.plan import measure

ROWS = [{"input_ids": [7] * length, "labels": [-100] * (length - 1) + [7]} for length in (3, 8, 5, 1)]
PAIRS = [
    {"prompt_ids": [7] * prompt}
    | {f"{side}_{kind}": [7] * length for side, length in answers.items() for kind in ("ids", "labels")}
    for prompt, answers in ((2, {"chosen": 4, "rejected": 1}), (3, {"chosen": 1, "rejected": 6}))
]


def test_each_row_has_its_length():
    dataset = Dataset.from_list(ROWS)
    assert list_lengths(dataset.data, "labels").tolist() == [3, 8, 5, 1]
    assert [each.tolist() for each in sequence_lengths(dataset.data, CONVERSATION)] == [[3, 8, 5, 1]]


def test_each_answer_of_a_pair_has_the_prompt_before_it():
    dataset = Dataset.from_list(PAIRS)
    assert [each.tolist() for each in sequence_lengths(dataset.data, PAIR)] == [[6, 4], [3, 9]]


def test_the_plan_and_the_doctor_have_the_same_lengths():
    for rows, row_type in ((ROWS, CONVERSATION), (PAIRS, PAIR)):
        dataset = Dataset.from_list(rows)
        assert measure(dataset, row_type).longest.tolist() == row_lengths(dataset, row_type).tolist()


def test_a_selection_has_the_lengths_of_its_own_rows():
    part = Dataset.from_list(ROWS).select([1, 3])
    assert measure(part, CONVERSATION).longest.tolist() == [8, 1]
