"""The last step of an epoch is filled up with rows that train nothing."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers.trainer_pt_utils import AcceleratorConfig

from utils.tasks import get_task
from utils.train.filler import FullBatches, WithEmptyRow, fills_up


@pytest.mark.parametrize("rows", range(1, 14))
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_are_full_and_each_row_comes_once(rows, processes):
    batches = FullBatches(range(rows), 2, processes, filler=rows)
    found = list(batches)
    assert len(found) == len(batches) and len(found) % processes == 0
    assert all(len(batch) == 2 for batch in found)
    assert sorted(row for batch in found for row in batch if row < rows) == list(range(rows))
    assert len(found) - processes < rows / 2 <= len(found)


def test_the_filler_is_an_unlabelled_row_that_len_does_not_count():
    rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6], "source": [1]}])
    rows = WithEmptyRow(rows, get_task("sft").row_type)
    assert len(rows) == 1
    assert rows.__getitems__([0, 1, 1]) == [
        {"input_ids": [5, 6], "labels": [-100, 6], "source": [1]},
        *[{"input_ids": [0], "labels": [-100], "source": []}] * 2,
    ]


@pytest.mark.parametrize(("given", "wanted"), [
    ({}, True), ({"dataloader_drop_last": True}, False), ({"train_sampling_strategy": "batch_rebalance"}, False),
    ({"accelerator_config": AcceleratorConfig(even_batches=False)}, False),
    ({"accelerator_config": AcceleratorConfig(split_batches=True)}, False),
])  # fmt: skip
def test_only_even_batches_of_one_size_are_filled_up(given, wanted):
    values = {"dataloader_drop_last": False, "train_sampling_strategy": "random"}
    train_args = SimpleNamespace(**{**values, "accelerator_config": AcceleratorConfig(), **given})
    assert fills_up(train_args, 2) is wanted and not fills_up(train_args, 1)
