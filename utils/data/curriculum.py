"""`--curriculum`: rows in order of their length, or of a number in the raw rows, easy first."""

import math
from decimal import Decimal

import numpy

from utils.data.files import read_rows
from utils.data.lengths import token_counts
from utils.data.mixture import FixedOrder, order_seed
from utils.data.places import decode_source, encode_source, format_sources
from utils.runtime.errors import Problem, UserError

COLUMN = "column:"
_SHOWN = 100  # rows without a number


def sorting_column(args) -> str | None:
    """The field of the raw rows that `--curriculum column:difficulty` names; None without one."""
    return args.curriculum.removeprefix(COLUMN) if args.curriculum.startswith(COLUMN) else None


def curriculum_order(args, train_args, data) -> FixedOrder:
    """Returns the order of `--curriculum`, the same in every epoch; equal rows are in an order drawn by the seed.

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument.
        data: the prepared rows.

    Raises:
        UserError: a row has no number in the column.
    """
    if column := sorting_column(args):
        values = _column_values(column, data)
    else:
        values = token_counts(data.train, args.task.row_type)
    drawn = numpy.random.default_rng(order_seed(train_args)).permutation(len(values))
    return FixedOrder(drawn[numpy.argsort(values[drawn], kind="stable")], f"--curriculum {args.curriculum}")


def _column_values(name: str, data) -> numpy.ndarray:
    """The numbers of a column of the raw rows, [rows]; the files are read again for them."""
    sources = [decode_source(source[0]) for source in data.train["source"]]
    wanted = set(sources)
    found: dict[tuple[int, int], float] = {}
    for number, file in enumerate(data.report.files):
        for raw in read_rows(file):
            place = (number, raw.line)
            if place in wanted and isinstance(raw.value, dict):
                value = _number(raw.value.get(name))
                found |= {} if value is None else {place: value}
    if missing := wanted - found.keys():
        places = format_sources((encode_source(*place) for place in sorted(missing)[:_SHOWN]), data.report.files)
        count = f"{len(missing):,} of {len(wanted):,} rows"
        message = (
            f"--curriculum {COLUMN}{name}: {count} have no number in {name!r}:{places}\n"
            "   Give each a number, name another column, or use --curriculum length"
        )
        raise UserError(Problem(message, flags=("curriculum",)))
    return numpy.array([found[place] for place in sources])


def _number(value) -> float | None:
    """The number of a field, of which CSV has the text and Parquet may have a Decimal; None if it has none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal, str)):
        return None
    if isinstance(value, str) and "_" in value:  # 1_000, which only Python takes for a number
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
