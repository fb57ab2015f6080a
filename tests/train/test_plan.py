"""The plan's count of passes and steps agrees with the batches that the samplers make."""

import math
from types import SimpleNamespace

import numpy
import pytest
from transformers.trainer_pt_utils import AcceleratorConfig

from utils.train.plan import Rows, first_epoch, passes_per_epoch, steps_of


def settings(**given):
    values = {
        "train_batch_size": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "seed": 1,
        "data_seed": None, "dataloader_drop_last": False, "train_sampling_strategy": "random", "max_steps": -1,
        "num_train_epochs": 2.5, "accelerator_config": AcceleratorConfig(),
    }  # fmt: skip
    return SimpleNamespace(**{**values, **given})


def rows_of(count):
    lengths = numpy.arange(1, count + 1)
    return Rows(lengths, lengths, lengths, numpy.ones(count), 1)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [19, 24, 37])
def test_counts_agree_with_the_samplers(strategy, drop_last, processes, count):
    train_args = settings(train_sampling_strategy=strategy, dataloader_drop_last=drop_last)
    updates = first_epoch(train_args, rows_of(count), processes)
    assert sum(map(len, updates)) == passes_per_epoch(train_args, count, processes)
    assert steps_of(train_args, count, processes) == math.ceil(2.5 * len(updates))


def test_max_steps_counts_before_epochs():
    assert steps_of(settings(max_steps=7), 100, 1) == 7


def test_an_epoch_takes_each_row_once():
    updates = first_epoch(settings(), rows_of(19), 2)
    rows = [row for update in updates for batches in update for batch in batches for row in batch]
    assert sorted(rows) == list(range(19))


def test_rows_of_an_epoch_depend_on_the_seed_of_the_data():
    orders = [
        first_epoch(settings(seed=seed, data_seed=data), rows_of(19), 1) for seed, data in ((1, 5), (2, 5), (1, 6))
    ]
    assert orders[0] == orders[1] != orders[2]
