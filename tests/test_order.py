"""The order of rows: that of transformers and accelerate, in less memory."""

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from transformers import Trainer, TrainingArguments

from utils.order import PART, RandomOrder
from utils.trainer import Surviving


@pytest.mark.parametrize("rows", [1, 7, PART, 2 * PART + 3])
def test_the_same_order_as_accelerates_in_every_epoch(rows):
    ours, theirs = RandomOrder(rows, 3), SeedableRandomSampler(range(rows), data_seed=3)
    assert len(ours) == rows
    for _ in range(2):
        assert list(ours) == list(theirs)
    for sampler in (ours, theirs):
        sampler.set_epoch(7)
    assert list(ours) == list(theirs)


class Ours(Surviving, Trainer):
    pass


@pytest.mark.parametrize("settings", [{}, {"data_seed": 5}, {"train_sampling_strategy": "sequential"}])
def test_a_trainers_batches_are_those_of_transformers(tmp_path, settings):
    def epochs(trainer_class):
        args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, seed=11, remove_unused_columns=False,
                                 per_device_train_batch_size=4, **settings)  # fmt: skip
        rows = [{"x": torch.tensor(float(number))} for number in range(10)]
        trainer = trainer_class(torch.nn.Linear(1, 1), args, train_dataset=rows)
        loader = trainer.get_train_dataloader()
        expected = trainer_class is Ours and "train_sampling_strategy" not in settings
        assert isinstance(loader.batch_sampler.sampler, RandomOrder) == expected
        found = []
        for epoch in (0, 1, 5):
            loader.set_epoch(epoch)
            found.append([batch["x"].tolist() for batch in loader])
        return found

    ours = epochs(Ours)
    assert ours == epochs(Trainer) and len(ours[0]) == 3
    assert (ours[0] == ours[1]) == ("train_sampling_strategy" in settings)
