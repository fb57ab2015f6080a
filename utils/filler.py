"""The last step of an epoch on several processes: filled up with rows that train nothing, rather than with repeats."""

from torch.utils.data import BatchSampler, Dataset

from utils.segments import IGNORED


def empty_row(columns: list[str]) -> dict:
    """A row of one token without a label, and of no file."""
    empty = {"input_ids": [0], "labels": [IGNORED], "source": [], "seq_lengths": [1]}
    return {name: empty[name] for name in columns}


class WithEmptyRow(Dataset):
    """Rows, with an empty one behind the last, which `len` does not count.

    Args:
        rows: a datasets.Dataset of N rows; index N is the empty one.
    """

    def __init__(self, rows):
        self.rows, self._empty = rows, empty_row(rows.column_names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> list[dict]:
        there = [place for place in places if place < len(self.rows)]
        return self.rows.__getitems__(there) + [self._empty] * (len(places) - len(there))


class FullBatches(BatchSampler):
    """Batches of equal size and equally many for each process, the last ones filled up with the index `filler`.

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
    """Whether the last step of an epoch is filled up with empty rows: where batches are of one size on each process."""
    config = train_args.accelerator_config
    own_batches = config.split_batches or config.dispatch_batches or not config.even_batches
    rebalanced = train_args.train_sampling_strategy == "batch_rebalance"
    return processes > 1 and not (train_args.dataloader_drop_last or own_batches or rebalanced)


class FillsUp:
    """A mix-in for TRL's SFTTrainer: an epoch trains each row once, on however many processes.

    accelerate would give the epoch's first rows a second time, and count them in the loss of the last step.
    """

    def get_train_dataloader(self):
        rows = self.train_dataset
        if not fills_up(self.args, self.accelerator.num_processes):
            return super().get_train_dataloader()
        loader = self._get_dataloader(
            WithEmptyRow(rows), "Training", self._train_batch_size, lambda _: self._get_train_sampler(rows), True
        )
        # accelerate's own, with its order of rows, of which each process takes its share
        shard = loader.batch_sampler
        inner = shard.batch_sampler
        shard.batch_sampler = FullBatches(inner.sampler, inner.batch_size, shard.num_processes, len(rows))
        return loader


def repeats(train_args, train, evaluation) -> str:
    """How many rows accelerate gives twice to fill a last step up, as a sentence; empty where there are none."""
    processes = train_args.world_size
    told = []
    if processes > 1 and not train_args.dataloader_drop_last:
        sizes = (train_args.train_batch_size, train_args.eval_batch_size)
        for what, rows, size in zip(("trained", "evaluated"), (train, evaluation), sizes, strict=True):
            twice = -len(rows) % (size * processes) if rows is not None else 0
            told += [f"{twice} of {len(rows):,} pairs are {what} twice"] if twice else []
    return f"to fill the last step of {processes} processes up, {' and '.join(told)}" if told else ""
