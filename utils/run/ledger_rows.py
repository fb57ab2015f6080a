"""Selects rows of a row ledger by their losses, and reads them from the data files."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.files import raw_rows
from utils.data.json_rows import RawRow
from utils.data.places import decode_source
from utils.runtime.errors import UserError, nearest_path
from utils.runtime.text import format_count
from utils.storage.files import sha256_of
from utils.storage.run_files import LEDGER_FILE
from utils.storage.run_folder import read_run_note
from utils.train.row_ledger import RowLedger

_ENOUGH = 20  # rows of a source that are compared with each other; fewer are compared with all rows
_OUTLIER = 3.0  # robust standard deviations above the median
_MAD = 1.4826  # the standard deviation of a normal distribution divided by its median absolute deviation


class Selection(NamedTuple):
    """A list of rows.

    Attributes:
        title: says which rows these are.
        pick: ledger → indices of its rows, the most striking first.
        why_not: ledger → why these rows cannot be looked for; empty if they can.
    """

    title: str
    pick: Callable[[RowLedger], np.ndarray]
    why_not: Callable[[RowLedger], str] = lambda ledger: ""


def read_run_ledger(path: str) -> RowLedger:
    """Reads the row ledger of a run.

    Args:
        path: the run's folder, one of its checkpoints, or the file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    place = Path(path)
    if not place.exists():
        siblings = place.parent.glob("*") if place.parent.is_dir() else []
        raise UserError(f"{path!r} does not exist.{nearest_path(path, siblings)} Give the folder of a run")
    file = place / LEDGER_FILE if place.is_dir() else place
    if not file.is_file():
        raise UserError(f"{path!r} holds no {LEDGER_FILE}; a run with --row_ledger true writes it with each checkpoint")
    try:
        return RowLedger.read(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} cannot be read as a row ledger: {error}") from error


def data_files(path: str, ledger: RowLedger) -> list[str]:
    """The training and validation files of a run.

    Args:
        path: as given to `read_run_ledger`.
        ledger: of the run.
    """
    place = Path(path)
    data = read_run_note(place if place.is_dir() else place.parent, "data")
    return ledger.note.files + [file["file"] for part in data.values() for file in part.get("files", [])]


def columns_of(ledger: RowLedger, indices: Iterable[int]) -> list[str]:
    """The values of `--columns` that rows were read with, each once."""
    columns = ledger.note.file_columns or [None] * len(ledger.note.files)
    found = [columns[decode_source(ledger.rows["source"][index])[0]] for index in indices]
    return list(dict.fromkeys(filter(None, found)))


def by_loss(ledger: RowLedger, chosen, losses=None) -> np.ndarray:
    """The indices of chosen rows, a mask [rows], the highest loss first: the last one, or as given, [rows]."""
    indices = np.flatnonzero(chosen)
    losses = ledger.rows["last_loss"] if losses is None else losses
    return indices[np.argsort(-losses[indices], kind="stable")]


def later_mean(ledger: RowLedger) -> np.ndarray:
    """The mean of each row's losses after its first, [rows]; the first of a row that was trained once.

    The first one depends most on how long the model had been trained before it.
    """
    rows = ledger.rows
    later = (rows["mean_loss"] * rows["times"] - rows["first_loss"]) / np.maximum(rows["times"] - 1, 1)
    return np.where(rows["times"] > 1, later, rows["first_loss"])


def too_little_learned(ledger: RowLedger) -> str:
    """Why mislabelled rows cannot be told from others, as `"only 85 of 200 rows were learned"`; empty if they can."""
    counts = ledger.counts()
    if not (ledger.rows["times"] > 1).any():
        return "no row was trained more than once; train for more epochs"
    if 2 * counts["learned"] < counts["rows"]:
        return f"only {counts['learned']:,} of {format_count(counts['rows'], 'row')} were learned; train longer"
    return ""


def looks_mislabelled(ledger: RowLedger) -> np.ndarray:
    """A mask of rows that kept a high loss while the others were learned, [rows].

    Rows that contradict the others are learned last (Arpit et al., 2017, arXiv 1706.05394), and have a high mean loss
    over the training (Swayamdipta et al., 2020, arXiv 2009.10795). Such a row here

    - was trained more than once, in a run that at its end had learned at least half of its rows
    - has a mean loss, after its first, more than three robust standard deviations (1.4826 · MAD) above the median of
      the rows of its source, or of all rows if its source has fewer than 20
    - has a last loss above their median as well

    A row that is right and only harder than the others looks the same, so each needs a look.
    """
    rows = ledger.rows
    again, found = rows["times"] > 1, np.zeros(len(rows["source"]), bool)
    if too_little_learned(ledger):
        return found
    mean, last = later_mean(ledger), rows["last_loss"]
    names, group = ledger.sources()
    for number in range(len(names)):
        own = again & (group == number)
        compared = own if own.sum() >= _ENOUGH else again
        middle = np.median(mean[compared])
        spread = _MAD * np.median(np.abs(mean[compared] - middle))
        found |= own & (mean - middle > _OUTLIER * spread) & (last > np.median(last[compared]))
    return found


def _in_state(name: str) -> Callable[[RowLedger], np.ndarray]:
    return lambda ledger: by_loss(ledger, ledger.states()[name])


SELECTIONS = {
    "worst": Selection(
        "the rows with the highest last loss", lambda ledger: by_loss(ledger, np.ones(len(ledger.rows["source"]), bool))
    ),
    "mislabelled": Selection(
        "rows that may be mislabelled, or only hard: their mean loss is far above that of the others",
        lambda ledger: by_loss(ledger, looks_mislabelled(ledger), later_mean(ledger)),
        too_little_learned,
    ),
    "forgotten": Selection(
        "forgotten rows: their loss was at most 0.8 of that at which their source starts (or of log 2), and rose "
        "above it again",
        _in_state("forgotten"),
    ),
    "never_learned": Selection(
        "rows that were never learned: their loss always was above 0.8 of that at which their source starts",
        _in_state("never_learned"),
    ),
}


def read_raw_rows(ledger: RowLedger, indices: Iterable[int]) -> tuple[dict[int, RawRow], list[str]]:
    """Reads rows of a ledger from their files.

    Args:
        ledger: of the run.
        indices: of the ledger's rows.

    Returns:
        index → the row as it is in its file, and why rows of some files cannot be read.
    """
    wanted: dict[int, dict[int, int]] = {}
    for index in indices:
        file, line = decode_source(ledger.rows["source"][index])
        wanted.setdefault(file, {})[line] = index
    found, problems = {}, []
    for file, lines in sorted(wanted.items()):
        path = ledger.note.files[file]
        if problem := _problem_of(path, ledger.note.sha256[file]):
            problems.append(problem)
            continue
        rows = {}
        for row in raw_rows(path):
            if row.line in lines and not row.fatal:
                rows[lines[row.line]] = row
            if len(rows) == len(lines):
                break
        if len(rows) < len(lines):
            problems.append(f"{path} does not have all of its rows, although it is unchanged")
        found |= rows
    return found, problems


def _problem_of(path: str, sha256: str) -> str | None:
    """Why a file's rows are not those of the run; None if they are."""
    try:
        changed = sha256_of(path) != sha256
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}); start this command in the folder that the run was started in"
    return f"{path} was changed since the run read it (its sha256 differs)" if changed else None


def as_json_line(row: RawRow) -> str:
    """A row as one line of JSON: the line of its file itself, if it has one.

    Raises:
        UserError: it holds a value that JSON does not have, such as a date of a Parquet file.
    """
    if row.unparsed:
        return row.value.strip()
    try:
        return json.dumps(row.value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{row.file}, row {row.line} cannot be written as JSON: {error}") from error
