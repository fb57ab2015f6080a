"""The row ledger: the losses of each training row over a run, by file and line, in a Parquet file.

A row's loss in a step is the mean over its labelled tokens, measured before the step changes the weights. Columns of
`row_ledger.parquet`, one row for each row that was trained:

    file, line                             where the row is, as in messages
    source                                 the name of its source in the losses by source
    first_loss, last_loss                  its loss in the first and in the latest step that trained it
    best_loss, worst_loss, mean_loss       the lowest, the highest and the mean of its losses
    times, first_step, last_step           in how many steps it was trained, and the numbers of these steps
    learned, forgotten, never_learned      see `RowLedger.states`
    file_index                             the index of the file in the run's list of files

The file's metadata holds, under the key `ledger`, what is needed to find the rows again: `LedgerNote` as JSON.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from utils.data.places import decode_source, decode_sources, encode_source
from utils.storage.files import replace_file

LEARNED_SHARE = 0.8  # of the loss that its source starts at; a row whose loss is at or below this share is learned
_EARLIEST = 20  # rows of a source whose first losses are those that it starts at
_EVEN_BET = float(np.log(2))  # loss of a token of probability 1/2, and of a pair without a preference
_KEY = b"ledger"
_MERGED_TOGETHER = 10_000  # sequences
_FIGURES = {
    "first_loss": "float32",
    "last_loss": "float32",
    "best_loss": "float32",
    "worst_loss": "float32",
    "mean_loss": "float64",
    "times": "int32",
    "first_step": "int32",
    "last_step": "int32",
}


@dataclass
class LedgerNote:
    """What a ledger's losses belong to.

    Attributes:
        step: the number of steps that the ledger covers.
        first_step: the step after which it begins; 0 for all of a run.
        files: the training files, in the order of their indices.
        sha256: of each file when it was read.
        sources: the name of each file's source.
        file_columns: the value of `--columns` for each file; empty in ledgers of earlier versions.
    """

    step: int = 0
    first_step: int = 0
    files: list[str] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    file_columns: list[str | None] = field(default_factory=list)


class RowLedger:
    """First, last, best, worst and mean loss of each row.

    Attributes:
        note: what the losses belong to.
        rows: `source` (as from `encode_source`, ascending) and the figures of `_FIGURES`, [rows] each.
    """

    def __init__(self, note: LedgerNote):
        self.note = note
        self.clear()

    def clear(self) -> None:
        """Removes all rows."""
        self._waiting: list[tuple] = []
        self.rows = {"source": np.zeros(0, "int64")} | {name: np.zeros(0, kind) for name, kind in _FIGURES.items()}

    def add(self, sources, steps, losses, tokens) -> None:
        """Adds the losses of sequences of later steps than before.

        They are merged into `rows` together with later ones, as each merge takes time in proportion to all rows.

        Args:
            sources: of each sequence, [N].
            steps: in which it was trained, [N].
            losses: the sum over its labelled tokens, [N]; one that is not finite is left out.
            tokens: how many these are, [N].
        """
        self._waiting.append((sources, steps, losses, tokens))
        if sum(len(batch[0]) for batch in self._waiting) >= _MERGED_TOGETHER:
            self.merge()

    def merge(self) -> None:
        """Merges all losses that were added into `rows`."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._update(*(np.concatenate(part) for part in zip(*waiting, strict=True)))

    def _update(self, sources, steps, losses, tokens) -> None:
        """Merges losses into `rows`; the arguments are those of `add`.

        Sequences of one row in one step are parts of one observation: pieces of a row that packing cut, or a row that
        was drawn twice.
        """
        used = np.isfinite(losses) & (tokens > 0)
        if not used.any():
            return
        order = np.lexsort((steps[used], sources[used]))
        source, step, loss, count = (values[used][order] for values in (sources, steps, losses, tokens))
        starts = _starts(source, step)
        loss = np.add.reduceat(loss, starts) / np.add.reduceat(count, starts)
        source, step = source[starts], step[starts]
        starts = _starts(source)
        times = np.diff(np.append(starts, len(source)))
        self._merge(source[starts], {
            "first_loss": loss[starts],
            "last_loss": loss[starts + times - 1],
            "best_loss": np.minimum.reduceat(loss, starts),
            "worst_loss": np.maximum.reduceat(loss, starts),
            "mean_loss": np.add.reduceat(loss, starts) / times,
            "times": times,
            "first_step": step[starts],
            "last_step": step[starts + times - 1],
        })  # fmt: skip

    def _merge(self, source, later: dict) -> None:
        """Merges figures of later steps into those of the rows.

        Args:
            source: of the rows, ascending, each once.
            later: as `rows`, for these.
        """
        rows, later = self.rows, {name: later[name].astype(kind) for name, kind in _FIGURES.items()}
        place = np.searchsorted(rows["source"], source)
        known = np.append(rows["source"], -1)[place] == source
        at, new = place[known], {name: values[known] for name, values in later.items()}
        total = rows["times"][at] + new["times"]
        rows["mean_loss"][at] += (new["mean_loss"] - rows["mean_loss"][at]) * new["times"] / total
        rows["best_loss"][at] = np.minimum(rows["best_loss"][at], new["best_loss"])
        rows["worst_loss"][at] = np.maximum(rows["worst_loss"][at], new["worst_loss"])
        rows["times"][at], rows["last_loss"][at], rows["last_step"][at] = total, new["last_loss"], new["last_step"]
        if not known.all():
            added = {"source": source, **later}
            self.rows = {name: np.insert(values, place[~known], added[name][~known]) for name, values in rows.items()}

    def place(self, index: int) -> str:
        """Where a row is: `"data/a.jsonl:12"`."""
        file, line = decode_source(self.rows["source"][index])
        return f"{self.note.files[file]}:{line}"

    def write(self, path: Path) -> None:
        """Writes the ledger as Parquet, completely or not at all."""
        import pyarrow
        import pyarrow.parquet

        self.merge()
        file, line = decode_sources(self.rows["source"])
        table = {
            "file": _named(self.note.files, file),
            "line": line,
            "source": _named(self.note.sources, file),
            **{name: self.rows[name] for name in _FIGURES},
            **self.states(),
            "file_index": file.astype("int32"),
        }
        table = pyarrow.table(table).replace_schema_metadata({_KEY: json.dumps(asdict(self.note))})
        with replace_file(path) as part:
            pyarrow.parquet.write_table(table, part)

    def sources(self) -> tuple[list[str], np.ndarray]:
        """The names of the sources, and the index of each row's, [rows]."""
        names, index = np.unique(self.note.sources, return_inverse=True)
        return list(names), index[decode_sources(self.rows["source"])[0]]

    def start_losses(self) -> np.ndarray:
        """The loss at which the source of each row starts, [rows].

        It is the median of the first losses of the source's 20 rows that were trained first; rows of the same step as
        the last of these count as well, and a source with fewer rows has all.
        """
        first_step, first_loss = self.rows["first_step"], self.rows["first_loss"]
        names, source_of = self.sources()
        starts = np.zeros(len(source_of))
        for number in range(len(names)):
            own = source_of == number
            if own.any():
                steps = np.sort(first_step[own])
                earliest = own & (first_step <= steps[:_EARLIEST][-1])
                starts[own] = np.median(first_loss[earliest])
        return starts

    def states(self) -> dict:
        """Which rows were learned, forgotten, or never learned.

        After Toneva et al., 2019, An Empirical Study of Example Forgetting (arXiv 1812.05159): an example that
        was right becomes wrong. A row of text is not right or wrong, so here it is learned at a loss of at most

            0.8 · max(loss at which its source starts, log 2)

        one bound for all rows of a source, whichever step trains them first: see `start_losses`. For a source that
        starts easy, below log 2 (tokens of probability 1/2), it is fixed.

        Returns:
            learned: by its last loss. forgotten: by its best loss and not by its last. never_learned: not by its best
            loss, although it was trained more than once. [rows] each.
        """
        self.merge()
        bound = LEARNED_SHARE * np.maximum(self.start_losses(), _EVEN_BET)
        learned, once = self.rows["last_loss"] <= bound, self.rows["best_loss"] <= bound
        return {"learned": learned, "forgotten": once & ~learned, "never_learned": ~once & (self.rows["times"] > 1)}

    def counts(self) -> dict[str, int]:
        """The number of rows, and of those in each of the `states`."""
        self.merge()
        found = {name: int(values.sum()) for name, values in self.states().items()}
        return {"rows": len(self.rows["source"]), **found}

    @classmethod
    def read(cls, path: Path) -> "RowLedger":
        """Reads a ledger that `write` wrote.

        Raises:
            OSError: it cannot be read.
            ValueError: it is none.
        """
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        try:
            note = json.loads(table.schema.metadata[_KEY])
            names = [known.name for known in fields(LedgerNote)]  # earlier versions stored others beside them
            ledger = cls(LedgerNote(**{name: note[name] for name in names if name in note}))
            file, line = (table[name].to_numpy().astype("int64") for name in ("file_index", "line"))
            ledger.rows = {"source": encode_source(file, line)}
            ledger.rows |= {name: table[name].to_numpy().astype(kind) for name, kind in _FIGURES.items()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no row ledger: {error}") from error
        return ledger


def format_counts(counts: dict[str, int]) -> str:
    """`format_counts(ledger.counts())` → `"51 of 60 rows learned, 1 forgotten, 3 never learned"`"""
    return (
        f"{counts['learned']:,} of {counts['rows']:,} rows learned, {counts['forgotten']:,} forgotten, "
        f"{counts['never_learned']:,} never learned"
    )


def _starts(*keys):
    """The index at which each run of equal keys begins: `_starts([3, 3, 5])` → `[0, 2]`."""
    changed = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return np.flatnonzero(np.append(True, changed))


def _named(names: list[str], index):
    """The names at the given indices, [N], as a pyarrow dictionary array."""
    import pyarrow

    each = list(dict.fromkeys(names))  # files of one source share its name
    numbers = np.array([each.index(name) for name in names], "int32")[index]
    return pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array(each, pyarrow.string()))
