"""Lengths of prepared rows, read from Arrow's offsets: no row becomes a Python list."""

import numpy

from utils.data.row_type import RowType

_ROWS = 10_000  # in memory at a time


def list_lengths(table, name: str) -> numpy.ndarray:
    """Returns the length of each list in a column, [rows].

    Args:
        table: `pyarrow.Table`, or the `data` of a `datasets.Dataset`.
        name: of the column.
    """
    import pyarrow.compute

    return pyarrow.compute.list_value_length(table.column(name)).to_numpy().astype(numpy.int64)


def token_counts(dataset, row_type: RowType) -> numpy.ndarray:
    """Returns the number of tokens of each row of a `datasets.Dataset`, those of all its sequences, [rows]."""
    batches = dataset.with_format("arrow").iter(_ROWS)
    return numpy.concatenate([sum(sequence_lengths(batch, row_type)) for batch in batches])


def sequence_lengths(table, row_type: RowType) -> list[numpy.ndarray]:
    """Returns the number of tokens of each sequence that a row becomes: an array, [rows], for each of `row_type`'s.

    A preference pair becomes two sequences, each with the prompt's tokens.

    Args:
        table: as for `list_lengths`.
        row_type: of the rows.
    """
    return [sum(list_lengths(table, name) for name in ids) for _, ids, _ in row_type.sequence_columns]
