"""Packs prepared rows together, and splits them into those to train on and those held back for validation."""

from itertools import accumulate

from utils.runtime.errors import UserError

# a column of packed rows: [0] in those that are trained on, [1] in those held back, which come after them
_HELD_BACK = "held_back"


def pack_rows(dataset, max_len: int, strategy: str, val_size: float = 0, seed: int = 0):
    """Packs rows with TRL's `pack_dataset`.

    Args:
        dataset: prepared rows.
        max_len: tokens of a packed row.
        strategy: TRL's, `bfd` for rows that stay in one piece or `bfd_split` for text that may be cut.
        val_size, seed: with a size, rows are split first, and each part is packed: a row of the files is then either
            trained on or held back, whatever it is packed with. `split_validation` takes the parts apart again.
    """
    from datasets import concatenate_datasets

    if not val_size:
        return _pack(dataset, max_len, strategy)
    parts = [_pack(part, max_len, strategy) for part in _split(dataset, val_size, seed)]
    return concatenate_datasets(
        [part.map(_mark, batched=True, fn_kwargs={"held": held}) for held, part in enumerate(parts)]
    )


def split_validation(dataset, val_size: float, seed: int) -> list:
    """Splits prepared or packed rows in [those to train on, those to hold back], drawn by the seed."""
    if _HELD_BACK not in dataset.column_names:
        return _split(dataset, val_size, seed)
    first = sum(mark == [0] for mark in dataset[_HELD_BACK])
    parts = [dataset.select(range(first)), dataset.select(range(first, len(dataset)))]
    return [part.remove_columns(_HELD_BACK) for part in parts]


def count_held_back(val_size: float, rows: int) -> int:
    """Counts the rows that `--val_size`, a number from 1 or a share below it, holds back.

    Raises:
        UserError: none is left to train on.
    """
    held = int(val_size) if val_size >= 1 else max(1, round(val_size * rows))
    if held >= rows:
        raise UserError(f"--val_size {val_size} leaves no row to train of {rows}; give a smaller one")
    return held


def _pack(dataset, max_len: int, strategy: str):
    from trl import pack_dataset

    # TRL cuts all columns alike, so each token carries its source until the rows are packed; then each sequence does
    with_sources = dataset.map(_source_of_each_token, batched=True)
    if "loss_weights" in dataset.column_names:
        with_sources = with_sources.map(_weight_of_each_token, batched=True)
    return pack_dataset(with_sources, max_len, strategy=strategy).map(_source_of_each_sequence, batched=True)


def _source_of_each_token(batch: dict) -> dict:
    return {"source": [source * len(ids) for source, ids in zip(batch["source"], batch["input_ids"], strict=True)]}


def _weight_of_each_token(batch: dict) -> dict:
    pairs = zip(batch["loss_weights"], batch["input_ids"], strict=True)
    return {"loss_weights": [[1.0] * len(ids) if weights is None else weights for weights, ids in pairs]}


def _source_of_each_sequence(batch: dict) -> dict:
    return {
        "source": [
            [sources[end - 1] for end in accumulate(lengths)]
            for sources, lengths in zip(batch["source"], batch["seq_lengths"], strict=True)
        ]
    }


def _mark(batch: dict, held: int) -> dict:
    return {_HELD_BACK: [[held]] * len(batch["input_ids"])}


def _split(dataset, val_size: float, seed: int) -> list:
    parts = dataset.train_test_split(test_size=count_held_back(val_size, len(dataset)), seed=seed)
    return [parts["train"], parts["test"]]
