"""Fills the last step of an epoch on several processes with rows without labels, instead of repeated rows."""

from loguru import logger
from torch.utils.data import BatchSampler, Dataset

from utils.data.row_type import RowType


class WithEmptyRow(Dataset):
    """A dataset with an empty row after the last, which `len` does not count.

    Args:
        rows: a datasets.Dataset of N rows; index N is the empty one.
        row_type: of the rows.
    """

    def __init__(self, rows, row_type: RowType):
        self.rows, self._empty = rows, row_type.filler(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> list[dict]:
        real = [place for place in places if place < len(self.rows)]
        return self.rows.__getitems__(real) + [self._empty] * (len(places) - len(real))


class FullBatches(BatchSampler):
    """A batch sampler with equally many full batches for each process, filled up with the index `filler`.

    `FullBatches(range(5), 2, processes=2, filler=5)` → `[0, 1], [2, 3], [4, 5], [5, 5]`
    """

    def __init__(self, sampler, batch_size: int, processes: int, filler: int):
        super().__init__(sampler, batch_size, drop_last=False)
        self.processes, self.filler = processes, filler

    def __len__(self) -> int:
        return super().__len__() + -super().__len__() % self.processes

    def __iter__(self):
        count = 0
        for batch in super().__iter__():
            count += 1
            yield batch + [self.filler] * (self.batch_size - len(batch))
        for _ in range(-count % self.processes):
            yield [self.filler] * self.batch_size


def fills_up(train_args, processes: int) -> bool:
    """Whether the last step of an epoch is filled up with empty rows: if all processes have batches of one size."""
    config = train_args.accelerator_config
    own_batches = config.split_batches or config.dispatch_batches or not config.even_batches
    rebalanced = train_args.train_sampling_strategy == "batch_rebalance"
    return processes > 1 and not (train_args.dataloader_drop_last or own_batches or rebalanced)


class FillLastStepMixin:
    """A mix-in for TRL's trainers: an epoch trains each row exactly once, also on several processes.

    accelerate 1.15 (even_batches) would repeat the epoch's first rows in the last step, and count them in its loss.

    Attributes:
        row_type: of the rows.
    """

    row_type: RowType

    def get_train_dataloader(self):
        rows = self.train_dataset
        if fills_up(self.args, self.accelerator.num_processes):
            return self.filled_loader(rows, "Training", self._train_batch_size, self._get_train_sampler, True)
        if self.accelerator.num_processes > 1 and not self.args.dataloader_drop_last:
            logger.warning("with this --accelerator_config an epoch's last step may train some of its rows twice")
        return super().get_train_dataloader()

    def filled_loader(self, rows, what: str, size: int, sampler_of, training: bool = False):
        """Builds accelerate's data loader, with empty rows instead of repeated ones in the last batches.

        Args:
            rows: a datasets.Dataset.
            what: a name for transformers' messages.
            size: the batch size.
            sampler_of: rows → sampler.
            training: whether the loader is for training.
        """
        filled = WithEmptyRow(rows, self.row_type)
        loader = self._get_dataloader(filled, what, size, lambda _: sampler_of(rows), training)
        shard = loader.batch_sampler
        inner = shard.batch_sampler
        shard.batch_sampler = FullBatches(inner.sampler, inner.batch_size, shard.num_processes, len(rows))
        return loader
