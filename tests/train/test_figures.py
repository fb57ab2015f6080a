"""Figures of several batches and processes are means over what counts."""

import math
from types import SimpleNamespace

import pytest
import torch

from utils.train.figures import WeightedFiguresMixin, gather_counted, gather_with


@pytest.mark.parametrize("batches", [[(4, 2.0), (1, 7.0)], [(0, math.nan), (0, math.nan), (4, 2.0), (1, 7.0)],
                                     [(4, 2.0), (0, math.nan), (1, 7.0)]])  # fmt: skip
def test_a_figure_is_one_mean_after_every_batch(batches):
    trainer = WeightedFiguresMixin()
    trainer.model, trainer._metrics = SimpleNamespace(training=True), {"train": {"entropy": []}}
    for count, mean in batches:
        trainer._metrics["train"]["entropy"].append(mean)
        trainer.weigh_figures({"entropy": count})
        assert len(trainer._metrics["train"]["entropy"]) == 1
    assert trainer._metrics["train"]["entropy"] == [3.0]  # (4 · 2 + 1 · 7) / 5


@pytest.mark.parametrize(("counts", "kept"), [([3, 0, 2], [1, 3]), ([3, 1, 2], [1, 2, 3]), ([0, 0, 0], [1, 2, 3])])
def test_a_number_of_a_process_without_rows_is_not_gathered(counts, kept):
    assert gather_counted(lambda value: torch.tensor([1, 2, 3]), counts, torch.tensor(1)).tolist() == kept


def test_other_tensors_are_gathered_from_every_process():
    assert gather_counted(lambda values: values.repeat(2), [3, 0], torch.tensor([1, 2])).tolist() == [1, 2, 1, 2]


def test_accelerates_gather_comes_back():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    with gather_with(accelerator, lambda value: value + 1):
        assert accelerator.gather_for_metrics(1) == accelerator.gather(1) == 2
    assert accelerator.gather_for_metrics(torch.tensor(1)) == accelerator.gather(torch.tensor(1)) == 1
