"""Lengths of prepared rows, read from Arrow's offsets: no row becomes a Python list."""

import numpy

from utils.data.row_type import RowType


def list_lengths(table, name: str) -> numpy.ndarray:
    """Returns the length of each list in a column, [rows].

    Args:
        table: `pyarrow.Table`, or the `data` of a `datasets.Dataset`.
        name: of the column.
    """
    import pyarrow.compute

    return pyarrow.compute.list_value_length(table.column(name)).to_numpy().astype(numpy.int64)


def sequence_lengths(table, row_type: RowType) -> list[numpy.ndarray]:
    """Returns the number of tokens of each sequence that a row becomes: an array, [rows], for each of `row_type`'s.

    A preference pair becomes two sequences, each with the prompt's tokens.

    Args:
        table: as for `list_lengths`.
        row_type: of the rows.
    """
    return [sum(list_lengths(table, name) for name in ids) for _, ids, _ in row_type.sequence_columns]
