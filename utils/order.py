"""The order in which rows are trained."""

from collections.abc import Iterator

PART = 10_000  # rows whose places are Python numbers at once


class RandomOrder:
    """Rows in a random order, another one each epoch: accelerate's `SeedableRandomSampler`, in less memory.

    That one holds the order as a list for the whole epoch, 40 bytes a row; a tensor takes 8.

    Attributes:
        rows: how many there are.
        seed: of the first epoch; each later one has the next.
    """

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        import torch

        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for part in torch.randperm(self.rows, generator=generator).split(PART):
            yield from part.tolist()
        self.epoch += 1

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader, also where a run goes on in a later epoch."""
        self.epoch = epoch


def seed_of_order(train_args) -> int:
    """`--data_seed`, or else the seed of everything."""
    return train_args.seed if train_args.data_seed is None else train_args.data_seed
