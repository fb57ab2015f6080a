"""Which rows of a ledger look mislabelled."""

import numpy as np
import pytest

from utils.data.places import encode_source
from utils.run.ledger_rows import SELECTIONS, looks_mislabelled, too_little_learned
from utils.train.row_ledger import LedgerNote, RowLedger


def ledger_of(losses, files=1, sources=None):
    """A ledger of rows with these losses by step, [rows, steps], divided over files."""
    losses = np.array(losses, dtype=float)
    rows, steps = losses.shape
    names = [f"{number}.jsonl" for number in range(files)]
    ledger = RowLedger(LedgerNote(step=steps, files=names, sha256=names, sources=sources or names))
    places = np.array([encode_source(row * files // rows, row + 1) for row in range(rows)])
    for step in range(steps):
        ledger.add(places, np.full(rows, step + 1), losses[:, step], np.ones(rows))
    ledger.merge()
    return ledger


def usual(rows, scale=1.0, seed=0):
    random = np.random.default_rng(seed)
    return scale * (np.array([4.0, 1.0, 0.3]) + random.normal(0, 0.1, (rows, 3)))


def lines(mask):
    return list(np.flatnonzero(mask) + 1)


def test_a_row_with_a_high_mean_and_last_loss_looks_mislabelled():
    losses = usual(40)
    losses[6], losses[20] = [4.0, 3.9, 3.0], [8.0, 8.0, 0.1]  # the second was hard at first, and is learned
    ledger = ledger_of(losses)
    assert lines(looks_mislabelled(ledger)) == [7]
    assert list(SELECTIONS["mislabelled"].pick(ledger)) == [6]
    assert list(SELECTIONS["worst"].pick(ledger))[0] == 6


@pytest.mark.parametrize(("losses", "why"), [
    (usual(40)[:, :1], "no row was trained more than once"),
    ([[4.0, 3.9, 3.8]] * 39 + [[9.0, 9.0, 9.0]], "only 0 of 40 rows were learned"),
    (np.concatenate([usual(19), [[4.0, 3.9, 3.8]] * 21]), "only 19 of 40 rows were learned"),
    (np.concatenate([usual(20), [[4.0, 3.9, 3.8]] * 20]), ""),
])  # fmt: skip
def test_without_learning_nothing_looks_mislabelled(losses, why):
    ledger = ledger_of(losses)
    assert not looks_mislabelled(ledger).any()
    assert too_little_learned(ledger).partition(";")[0] == why


def test_a_row_that_was_trained_early_does_not_look_mislabelled_for_it():
    losses = usual(40)
    losses[3] = [40.0, 1.0, 0.35]  # the loss before the first step is far above those of rows that were drawn later
    assert not looks_mislabelled(ledger_of(losses)).any()


def test_rows_are_compared_with_those_of_their_source():
    losses = np.concatenate(
        [usual(30, seed=1), usual(30, scale=3.0, seed=1)]
    )  # the second source is harder, and no row of it is wrong
    assert not looks_mislabelled(ledger_of(losses, files=2)).any()
    losses[4] = [9.0, 8.0, 2.0]
    assert lines(looks_mislabelled(ledger_of(losses, files=2))) == [5]
    few = np.concatenate([usual(40), usual(4, scale=3.0)])
    assert lines(looks_mislabelled(ledger_of(few, files=11))) == [41, 42, 43, 44]  # of four rows a file: with all rows
