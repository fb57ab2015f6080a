"""Trains each epoch's rows in an order that is a function of the epoch: a mixture of sources, or a curriculum."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler


class OrderSampler(Sampler):
    """A sampler of the rows of an order, as `utils.data.mixture.Mixture`.

    accelerate's `set_epoch` counts the data loader's epochs from 0 also in a resumed run, so that it is not used here.
    """

    def __init__(self, order):
        self.order = order
        self._epoch = 0

    def start_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.indices(self._epoch).tolist())


class OrderMixin:
    """A mix-in for transformers' Trainer: trains the rows of `order`.

    The order does not depend on the number of processes, each of which takes its batches of it.

    Attributes:
        order: `utils.data.mixture.Mixture` or `FixedOrder`.
    """

    order: Any = None

    def _get_train_sampler(self, train_dataset=None):
        self._sampler = OrderSampler(self.order)
        return self._sampler

    def _run_epoch(self, *args, epoch, **more):
        self._sampler.start_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **more)

    def num_examples(self, dataloader):
        dataset = getattr(dataloader, "dataset", None)
        is_train = getattr(dataset, "rows", dataset) is self.train_dataset  # `WithEmptyRow` has rows
        return len(self.order) if is_train else super().num_examples(dataloader)
