"""The order of the rows of an epoch: mixed from several sources, or in a fixed order, a pure function of the epoch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from utils.data.sources import Source
from utils.runtime.errors import Problem, UserError
from utils.runtime.text import format_count

CONCAT, INTERLEAVE, WEIGHTED = "concat", "interleave", "weighted"
ROWS, TOKENS = "rows", "tokens"
FIRST, ALL = "first_exhausted", "all_exhausted"
_TINY = 1e-9  # of rows: errors of floating-point numbers
_MOST = 2**31  # rows of an epoch; more can only be a mistake in a weight or in repeat


def order_seed(train_args) -> int:
    """The seed of the order of rows for numpy, which takes no negative one: `--data_seed`, or `--seed` without it.

    Args:
        train_args: the recipe's TrainArgument.
    """
    seed = train_args.seed if train_args.data_seed is None else train_args.data_seed
    return seed % 2**64


def strategy_of(args, sources: Sequence[Source]) -> str:
    """The value of `--mixing_strategy`: without it, weighted if the sources have weights, else concat."""
    return args.mixing_strategy or (WEIGHTED if sources and sources[0].weight is not None else CONCAT)


@dataclass(frozen=True)
class FixedOrder:
    """The same order of rows in every epoch.

    Attributes:
        rows: indices of the prepared rows, [rows].
        name: describes the order: `--curriculum length`.
    """

    rows: Any
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """The name with a hash of the order, for checkpoints."""
        return f"{self.name} ({hashlib.sha256(numpy.asarray(self.rows, numpy.int64).tobytes()).hexdigest()[:12]})"

    def indices(self, epoch: int) -> numpy.ndarray:
        """The indices of the rows of an epoch, [rows], in the order in which they are trained."""
        return self.rows


@dataclass(frozen=True)
class Mixture:
    """The rows of each epoch, drawn from several sources whose prepared rows follow each other in one dataset.

    How many rows of each source an epoch has is fixed, so that its steps are known before the training. Which rows, and
    their order, depends on the seed and the number of the epoch: each epoch continues where the one before it ended.

    Attributes:
        sources: the settings of each.
        sizes: prepared rows of each, [sources].
        tokens: mean tokens of a row of each, [sources].
        strategy: `concat`, `interleave` or `weighted`; `unit` and `stop` as `--mixing_unit` and `--mixing_stop`.
        seed: of the order.
        packed: whether the rows are packed ones.
        counts: rows of each in an epoch, [sources].
    """

    sources: tuple[Source, ...]
    sizes: tuple[int, ...]
    tokens: tuple[float, ...]
    strategy: str
    unit: str = ROWS
    stop: str = FIRST
    seed: int = 42
    packed: bool = False
    counts: tuple[int, ...] = field(init=False)

    def __post_init__(self):
        for source, size in zip(self.sources, self.sizes, strict=True):
            if source.rows is not None and source.rows > size:
                raise _refused(source, f"rows: {source.rows:,} asks for more than the {size:,} rows that can be used")
        counts = {CONCAT: self._concat, INTERLEAVE: self._interleave, WEIGHTED: self._weighted}[self.strategy]()
        if not counts.sum() <= _MOST:
            self._refuse_size(counts)
        object.__setattr__(self, "counts", tuple(int(count) for count in counts))
        for source, count in zip(self.sources, self.counts, strict=True):
            if not count:
                raise _refused(source, "gives no row to an epoch; raise its weight, rows or repeat")

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def name(self) -> str:
        """Everything that the order depends on beside the rows and the seed."""
        how = {CONCAT: "", INTERLEAVE: f", {self.stop}", WEIGHTED: f" by {self.unit}, {self.stop}"}[self.strategy]
        parts = []
        for source in self.sources:
            own = {
                "weight": source.weight,
                "rows": source.rows,
                "repeat": source.repeat if source.repeat != 1 else None,
            }
            given = [f"{key} {_exact(value)}" for key, value in own.items() if value is not None]
            parts.append(f"{source.name} ({', '.join(given)})" if given else source.name)
        return f"{self.strategy}{how}: {'; '.join(parts)}"

    @property
    def fingerprint(self) -> str:
        """For checkpoints."""
        return self.name

    def _refuse_size(self, shares: numpy.ndarray) -> None:
        """Raises a `UserError` that names the source with the most rows of an epoch that has too many."""
        remedy = "raise the smallest weight" if self.strategy == WEIGHTED else "lower its repeat"
        remedy += ", or use --mixing_stop first_exhausted" if self.stop == ALL else ""
        message = f"makes an epoch longer than the {_MOST:,} rows that are allowed; {remedy}"
        raise _refused(self.sources[int(shares.argmax())], message)

    # ------------------------------------------------------------------ how many rows of each source
    def _available(self) -> numpy.ndarray:
        """The rows of each source that one pass through it takes, [sources]."""
        taken = [source.rows or size for source, size in zip(self.sources, self.sizes, strict=True)]
        return numpy.array(taken, numpy.int64)

    def _concat(self) -> numpy.ndarray:
        repeats = numpy.array([source.repeat for source in self.sources])
        with numpy.errstate(over="ignore"):
            return numpy.floor(self._available() * repeats + 0.5)

    def _interleave(self) -> numpy.ndarray:
        """As `datasets.interleave_datasets`: one row of each in turn, until the shortest or the longest is used up."""
        available = self._available()
        return numpy.full(len(available), available.min() if self.stop == FIRST else available.max())

    def _weighted(self) -> numpy.ndarray:
        """The shares of the weights, of as many rows as use up the first source, or all of them."""
        available = self._available()
        shares = numpy.array([source.weight for source in self.sources], float)
        if self.unit == TOKENS:
            shares /= numpy.array(self.tokens)  # share of rows = share of tokens / tokens of a row
        shares /= shares.max()  # the sum of large weights is no finite number
        shares /= shares.sum()
        with numpy.errstate(divide="ignore", over="ignore"):
            needed = available / shares  # rows of an epoch that goes through each source once
        total = numpy.floor(needed.min() + _TINY) if self.stop == FIRST else numpy.ceil(needed.max() - _TINY)
        if not total <= _MOST:
            self._refuse_size(shares)
        counts = numpy.floor(total * shares + _TINY).astype(numpy.int64)
        rest = numpy.argsort(counts - total * shares, kind="stable")[: int(total) - counts.sum()]  # largest remainders
        counts[rest] += 1
        return counts

    # ------------------------------------------------------------------ which rows, in which order
    def indices(self, epoch: int) -> numpy.ndarray:
        """The indices of the rows of an epoch, [rows], in the order in which they are trained.

        Over the epochs, a row comes again only after all others of its source have come.
        """
        slots = self._slots(epoch)
        rows = numpy.empty(len(slots), numpy.int64)
        start = 0
        for number, size in enumerate(self.sizes):
            rows[slots == number] = start + self._drawn(number, epoch)
            start += size
        return rows

    def _slots(self, epoch: int) -> numpy.ndarray:
        """The number of the source of each row of an epoch, [rows]."""
        if self.strategy == INTERLEAVE:
            return numpy.tile(numpy.arange(len(self.counts)), self.counts[0])
        return self._generator(epoch).permutation(numpy.repeat(numpy.arange(len(self.counts)), self.counts))

    def _drawn(self, number: int, epoch: int) -> numpy.ndarray:
        """The rows of one source, counted from its first, in the order in which they are trained, [count].

        The source is gone through again and again, in one order drawn for the run; an epoch begins where the one
        before it has ended, so that it has no row twice before it has all. Its rows are shuffled within each pass. With
        `rows` an epoch that needs more of them repeats its own.
        """
        size, count = self.sizes[number], self.counts[number]
        different = min(count, self.sources[number].rows or count)
        times, within = numpy.divmod(numpy.arange(count), different)
        position = epoch * different + within  # in the endless passes
        # the pass through `rows`, then the pass through the source, of which `rows` has parts of at most two
        passes = 2 * times + position // size - epoch * different // size
        shuffled = numpy.argsort(passes + self._generator(epoch, number + 1).random(count))
        order = self._generator(0, number + 1, 1).permutation(size)  # 1: other random numbers than those of epoch 0
        return order[position[shuffled] % size]

    def _generator(self, epoch: int, *more: int) -> numpy.random.Generator:
        return numpy.random.default_rng((self.seed, epoch, *more))

    # ------------------------------------------------------------------ what was drawn
    def count_drawn(self, rows_of_epochs: list[int]) -> numpy.ndarray:
        """How many rows of each source were trained, [sources].

        Args:
            rows_of_epochs: how many of its first rows each epoch has trained.
        """
        counts = numpy.zeros(len(self.counts), numpy.int64)
        for epoch, rows in enumerate(rows_of_epochs):
            every = rows == len(self)
            counts += self.counts if every else numpy.bincount(self._slots(epoch)[:rows], minlength=len(self.counts))
        return counts

    def table(self, counts=None) -> list[dict]:
        """Name, rows, tokens, shares and passes of each source; of one epoch, or of the given number of rows of each.

        Tokens are the mean of the source's rows, times the rows.
        """
        counts = numpy.array(self.counts if counts is None else counts)
        tokens = counts * numpy.array(self.tokens)
        return [
            {
                "source": source.name,
                "rows": int(counts[number]),
                "packed": self.packed,
                "share_of_rows": float(counts[number] / max(counts.sum(), 1)),
                "tokens": round(tokens[number]),
                "share_of_tokens": float(tokens[number] / max(tokens.sum(), 1)),
                "epochs": float(counts[number] / self._available()[number]),
            }
            for number, source in enumerate(self.sources)
        ]


def format_mixture(table: list[dict]) -> list[str]:
    """Formats the table of a mixture, one line for each source.

    `"maths: 70 rows (70.0 %), 7,000 tokens (82.4 %), 0.7 times its rows"`
    """
    lines = []
    for line in table:
        rows = "packed row" if line.get("packed") else "row"  # runs of earlier versions do not note it
        lines.append(
            f"{line['source']}: {format_count(line['rows'], rows)} ({100 * line['share_of_rows']:.1f} %), "
            f"{format_count(line['tokens'], 'token')} ({100 * line['share_of_tokens']:.1f} %), "
            f"{format_times(line['epochs'])} times its {rows}s"
        )
    return lines


def format_times(value: float) -> str:
    """Three digits of a number, and all before the point: `0.2667` → `"0.267"`, `300000.0` → `"300,000"`."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _exact(value: float) -> str:
    """All digits of a number: `2.0` → `"2"`, `1234567.5` → `"1234567.5"`."""
    return repr(int(value) if value == int(value) else value)


def _refused(source: Source, message: str) -> UserError:
    return UserError(Problem(f"--train_data_path: the source {source.name!r} {message}", flags=("train_data_path",)))
