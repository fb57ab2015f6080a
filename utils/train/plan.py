"""Plans a run: its steps, the rows and tokens of each update, the schedule, and when it logs, evaluates and saves."""

import copy
import math
from dataclasses import dataclass

import numpy

from utils.data.lengths import list_lengths, sequence_lengths
from utils.data.row_type import RowType
from utils.runtime.errors import UserError
from utils.template.tokenize import IGNORE_INDEX

_PARTS = 10_000  # rows measured at once
_UPDATES = 10_000_000  # more could not be listed in memory, and no run would reach the end of them
_POINTS = 10_000  # steps of the schedule looked at for its highest rate


@dataclass
class Rows:
    """Token counts of prepared rows, each summed over the row's sequences.

    Attributes:
        tokens: all tokens, [rows].
        trained: tokens with a label, [rows].
        longest: the length of the longest sequence, [rows]; padding fills a batch up to the largest of these.
        examples: how many rows of the files each holds, [rows]; more than 1 if they are packed.
        sequences: how many sequences a row becomes: 2 for a preference pair.
        order: indices of the rows of the first epoch, in order; None for those that the trainer draws.
    """

    tokens: numpy.ndarray
    trained: numpy.ndarray
    longest: numpy.ndarray
    examples: numpy.ndarray
    sequences: int
    order: numpy.ndarray | None = None

    def in_epoch(self) -> numpy.ndarray:
        """The indices of the rows of the first epoch, some of which may be missing, and others repeated."""
        return numpy.arange(len(self.tokens)) if self.order is None else self.order


def measure(dataset, row_type: RowType) -> Rows:
    """Counts the tokens of prepared rows.

    Args:
        dataset: `datasets.Dataset` with the columns of `row_type`.
        row_type: of the rows.
    """
    parts: list[list[numpy.ndarray]] = []
    for batch in dataset.with_format("arrow").iter(_PARTS):
        lengths = sequence_lengths(batch, row_type)
        trained = sum(_labelled(batch, labels) for _, _, labels in row_type.sequence_columns)
        packed = "seq_lengths" in batch.column_names
        examples = list_lengths(batch, "seq_lengths") if packed else numpy.ones_like(lengths[0])
        parts.append([sum(lengths), trained, numpy.maximum.reduce(lengths), examples])
    columns = (numpy.concatenate(column) for column in zip(*parts, strict=True))
    return Rows(*columns, sequences=len(row_type.sequence_columns))


def extend(rows: Rows, count: int) -> Rows:
    """Repeats the counts of the first rows of a stream, as an estimate of those of all its `count` rows."""
    repeated = [numpy.resize(column, count) for column in (rows.tokens, rows.trained, rows.longest, rows.examples)]
    return Rows(*repeated, sequences=rows.sequences)


def _labelled(batch, name: str) -> numpy.ndarray:
    """The number of trained labels of each row, [rows]."""
    values = batch[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    before = numpy.concatenate([[0], numpy.cumsum(values != IGNORE_INDEX)])
    ends = numpy.cumsum(list_lengths(batch, name))
    return before[ends] - before[numpy.concatenate([[0], ends[:-1]])]


def passes_per_epoch(train_args, rows: int, processes: int) -> int:
    """How many batches each process computes in an epoch.

    `rows=10` of 2 a batch on 2 processes → 3, or 2 with `--dataloader_drop_last true`
    """
    share = rows / (train_args.per_device_train_batch_size * processes)
    return max(1, math.floor(share) if train_args.dataloader_drop_last else math.ceil(share))


def steps_of(train_args, rows: int, processes: int) -> int:
    """How many optimizer steps a training on `rows` rows takes, whatever their lengths."""
    passes = passes_per_epoch(train_args, rows, processes)
    return _total_steps(train_args, math.ceil(passes / train_args.gradient_accumulation_steps))


def rows_of_epochs(train_args, rows: int, processes: int, steps: int) -> list[int]:
    """How many rows each epoch has trained after `steps` updates, of `rows` rows an epoch.

    `rows=10` in steps of 4, after 4 steps → `[10, 4]`
    """
    passes = passes_per_epoch(train_args, rows, processes)
    of_pass = train_args.per_device_train_batch_size * processes
    per_epoch = math.ceil(passes / train_args.gradient_accumulation_steps)
    epochs, rest = divmod(steps, per_epoch)
    complete = min(rows, passes * of_pass)
    of_rest = min(complete, rest * train_args.gradient_accumulation_steps * of_pass)
    return [complete] * epochs + ([of_rest] if rest else [])


def _total_steps(train_args, per_epoch: int) -> int:
    """The number of updates, counted as transformers 5.23 does in Trainer.set_initial_training_values."""
    return train_args.max_steps if train_args.max_steps > 0 else math.ceil(train_args.num_train_epochs * per_epoch)


def first_epoch(train_args, rows: Rows, processes: int) -> list[list[list[list[int]]]]:
    """The rows of each update of the first epoch, in the order of the run's seed: update → pass → process → rows.

    Divided as by transformers' Trainer and accelerate. With `--train_sampling_strategy group_by_length` the order also
    depends on earlier random numbers, so that the run's order is a similar one, but not the same.
    """
    of_process = [_batches(train_args, rows, processes, rank) for rank in range(processes)]
    passes = list(zip(*of_process, strict=False))  # with even batches all processes have equally many
    steps = train_args.gradient_accumulation_steps
    return [passes[start : start + steps] for start in range(0, len(passes), steps)]


def _batches(train_args, rows: Rows, processes: int, rank: int) -> list[list[int]]:
    import torch
    from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
    from torch.utils.data import BatchSampler, SequentialSampler
    from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

    from utils.train.filler import FullBatches, fills_up

    lengths, size = rows.tokens.tolist(), train_args.train_batch_size
    seed = train_args.seed if train_args.data_seed is None else train_args.data_seed
    steps, drop_last = train_args.gradient_accumulation_steps, train_args.dataloader_drop_last
    if rows.order is not None:
        order = rows.order.tolist()
    elif train_args.train_sampling_strategy == "batch_rebalance":
        return list(
            BatchRebalanceSampler(
                lengths, size * steps * processes, dp_size=processes, grad_accum=steps, rank=rank, drop_last=drop_last
            )
        )
    elif train_args.train_sampling_strategy == "group_by_length":
        order = LengthGroupedSampler(size * steps, lengths=lengths, generator=torch.Generator().manual_seed(seed))
    elif train_args.train_sampling_strategy == "sequential":
        order = SequentialSampler(lengths)
    else:
        order = SeedableRandomSampler(lengths, data_seed=seed)
    batches = BatchSampler(order, size, drop_last)
    if processes == 1:
        return list(batches)  # accelerate fills up the last batch only with several processes
    config = train_args.accelerator_config
    if fills_up(train_args, processes):
        share = BatchSamplerShard(FullBatches(order, size, processes, len(lengths)), processes, rank)
        return [[row for row in batch if row < len(lengths)] for batch in share]
    shard = {"split_batches": config.split_batches, "even_batches": config.even_batches}
    return list(BatchSamplerShard(batches, processes, rank, **shard))


def plan(train_args, rows: Rows, evaluated: int, processes: int, padded: bool) -> dict:
    """The plan of a run, as numbers.

    Args:
        train_args: the recipe's TrainArgument.
        rows: the training rows.
        evaluated: how many validation rows there are.
        processes: how many train together.
        padded: whether the rows of a batch are padded to the longest.

    Raises:
        UserError: no row is left to train, or there are too many updates to plan.
    """
    updates = first_epoch(train_args, rows, processes)
    count = len(rows.in_epoch())
    if not updates:
        raise UserError(
            f"--dataloader_drop_last true leaves none of the {count:,} rows: --per_device_train_batch_size "
            f"{train_args.per_device_train_batch_size} on {processes} processes takes more; give less of them"
        )
    per_epoch = len(updates)
    steps = _checked_steps(train_args, per_epoch)
    return {
        "steps": steps,
        "updates_per_epoch": per_epoch,
        "epochs": steps / per_epoch,
        "processes": processes,
        "passes_per_update": train_args.gradient_accumulation_steps,
        "rows": count,
        "examples": int(rows.examples[rows.in_epoch()].sum()),
        # repeated so that all processes have equally many; below 0, rows left out by --dataloader_drop_last
        "rows_repeated": sum(len(batch) for update in updates for step in update for batch in step) - count,
        **_sizes(updates[:steps], rows, padded),
        "warmup_steps": train_args.get_warmup_steps(steps),
        "learning_rate": _rates(train_args, steps),
        **_occasions(train_args, steps, per_epoch, evaluated),
        "rows_to_evaluate": evaluated,
        "passes_per_evaluation": math.ceil(evaluated / (train_args.eval_batch_size * processes)),
    }


def _checked_steps(train_args, per_epoch: int) -> int:
    """The number of updates, refused if they are too many to list."""
    steps = _total_steps(train_args, per_epoch)
    if steps > _UPDATES:
        flag = "max_steps" if train_args.max_steps > 0 else "num_train_epochs"
        raise UserError(
            f"--{flag} {getattr(train_args, flag):,g} makes {steps:,} updates; at most {_UPDATES:,} can be planned; "
            "give less"
        )
    return steps


def _sizes(updates: list, rows: Rows, padded: bool) -> dict:
    """The rows and tokens of an update, and of a batch that one process computes."""
    rows_of = [numpy.array(sum((batch for step in update for batch in step), [])) for update in updates]
    tokens, trained, examples = (
        [int(column[chosen].sum()) for chosen in rows_of] for column in (rows.tokens, rows.trained, rows.examples)
    )
    # an empty batch only fills up the last step of a process
    passes = [batch for update in updates for step in update for batch in step if batch]
    computed = [
        len(batch) * rows.sequences * int(rows.longest[batch].max()) if padded else int(rows.tokens[batch].sum())
        for batch in passes
    ]
    return {
        "rows_per_update": _spread([len(chosen) for chosen in rows_of]),
        "examples_per_update": _spread(examples),
        "tokens_per_update": _spread(tokens),
        "trained_tokens_per_update": _spread(trained),
        "rows_per_pass": _spread([len(batch) for batch in passes]),
        "tokens_per_pass": _spread([int(rows.tokens[batch].sum()) for batch in passes]),
        "computed_per_pass": _spread(computed),
        "padding": 1 - sum(int(rows.tokens[batch].sum()) for batch in passes) / sum(computed),
    }


def _spread(values: list[int]) -> dict:
    """`[3, 5, 4]` → mean 4, smallest 3, largest 5, which is the 2nd"""
    largest = max(values)
    return {
        "mean": sum(values) / len(values),
        "smallest": min(values),
        "largest": largest,
        "at": values.index(largest) + 1,
    }


def _rates(train_args, steps: int) -> dict | None:
    """The first, highest and last learning rate; None if the schedule depends on evaluations."""
    import torch
    from transformers import get_scheduler

    rate = train_args.learning_rate
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    warmup = train_args.get_warmup_steps(steps)
    options = copy.copy(train_args.lr_scheduler_kwargs) or None
    schedule = get_scheduler(train_args.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=options)
    if not hasattr(schedule, "lr_lambdas"):
        return None
    scale = schedule.lr_lambdas[0]
    looked_at = {0, min(warmup, steps - 1), steps - 1, *range(0, steps, max(1, steps // _POINTS))}
    return {"first": rate * scale(0), "highest": rate * max(map(scale, looked_at)), "last": rate * scale(steps - 1)}


def _occasions(train_args, steps: int, per_epoch: int, evaluated: int) -> dict:
    """The steps at which the run logs, evaluates and saves, as transformers' DefaultFlowCallback decides."""
    from transformers import TrainerState

    state = TrainerState()
    state.compute_steps(train_args, steps)
    ends = [min(steps, end) for end in range(per_epoch, steps + per_epoch, per_epoch)]
    found = {}
    for kind in ("logging", "eval", "save"):
        strategy = str(getattr(train_args, f"{kind}_strategy").value)
        every = int(getattr(state, f"{kind}_steps") or 0) if strategy == "steps" else None
        at = set(ends) if strategy == "epoch" else set(range(every, steps + 1, every)) if every else set()
        if kind == "logging":
            at |= {1} if train_args.logging_first_step else set()
        elif strategy == "steps":
            at |= {steps}
        if kind == "eval":
            by_epoch = strategy == "epoch"
            at = {step for step in at if (step / per_epoch if by_epoch else step) >= train_args.eval_delay}
            at = at | ({0} if train_args.eval_on_start else set()) if evaluated else set()
        found[kind] = {"strategy": strategy, "every": every, "times": len(at), "steps": sorted(at)}
    return found
