"""The table of rows' losses: merged step by step, written and read again, and which rows were forgotten."""

import json

import numpy as np
import pyarrow.parquet
import pytest

from utils.data.places import encode_source
from utils.train.row_ledger import LedgerNote, RowLedger

NOTE = LedgerNote(files=["a.jsonl", "b/one.csv", "b/two.csv"], sha256=["x", "y", "z"], sources=["a", "b", "b"])


def one_by_one(observed):
    """The figures of each row in plain Python: (source, step, sum of losses, tokens) → source → figures."""
    sums = {}
    for source, step, loss, tokens in observed:
        if np.isfinite(loss) and tokens:
            before = sums.get((source, step), (0, 0))
            sums[source, step] = (before[0] + loss, before[1] + tokens)
    found = {}
    for source in {source for source, _ in sums}:
        steps = sorted(step for other, step in sums if other == source)
        losses = [sums[source, step][0] / sums[source, step][1] for step in steps]
        found[source] = [
            losses[0], losses[-1], min(losses), max(losses), sum(losses) / len(losses), len(steps), steps[0], steps[-1],
        ]  # fmt: skip
    return found


def observations(count=400, seed=0):
    """Random ones of 30 rows in three files, in the order of steps; some rows twice in a step, some losses NaN."""
    random = np.random.default_rng(seed)
    steps = np.sort(random.integers(1, 60, count))
    sources = encode_source(random.integers(0, 3, count), random.integers(1, 11, count))
    losses = np.where(random.random(count) < 0.02, np.nan, random.random(count) * 50)
    return sources, steps, losses, random.integers(0, 9, count).astype("float32")


@pytest.mark.parametrize("cuts", [(), (25,), (1, 2, 30, 31, 59)])
def test_the_figures_are_those_of_each_row_alone_however_they_are_taken(cuts):
    sources, steps, losses, tokens = observations()
    ledger = RowLedger(NOTE)
    for low, high in zip((0, *cuts), (*cuts, 99), strict=True):
        part = (steps > low) & (steps <= high)
        ledger.add(sources[part], steps[part], losses[part], tokens[part])
        if low == 1:
            ledger.merge()
    ledger.merge()
    rows, wanted = ledger.rows, one_by_one(zip(sources, steps, losses, tokens, strict=True))
    assert list(rows["source"]) == sorted(wanted) and len(wanted) == 30
    for place, source in enumerate(rows["source"]):
        found = [values[place] for name, values in rows.items() if name != "source"]
        assert found == pytest.approx(wanted[source], rel=1e-5)


def test_many_losses_are_merged_together():
    ledger = RowLedger(NOTE)
    for step in range(1, 4):
        ledger.add(np.arange(4000), np.full(4000, step), np.ones(4000), np.ones(4000))
        assert len(ledger.rows["source"]) == (4000 if step == 3 else 0)
    assert ledger.counts()["rows"] == 4000 and set(ledger.rows["times"]) == {3}


def test_a_ledger_is_read_as_it_was_written(tmp_path):
    ledger, halves = RowLedger(NOTE), RowLedger(NOTE)
    sources, steps, losses, tokens = observations()
    early = steps <= 30
    for part in (early, ~early):
        ledger.add(sources[part], steps[part], losses[part], tokens[part])
        ledger.merge()
    halves.add(sources[early], steps[early], losses[early], tokens[early])
    halves.write(tmp_path / "half.parquet")
    halves = RowLedger.read(tmp_path / "half.parquet")
    assert halves.note == NOTE
    halves.add(sources[~early], steps[~early], losses[~early], tokens[~early])
    ledger.merge()
    halves.merge()
    for name, values in ledger.rows.items():
        assert values.dtype == halves.rows[name].dtype and (values == halves.rows[name]).all(), name


def test_the_table_names_file_line_and_source(tmp_path):
    ledger = RowLedger(NOTE)
    places = [(0, 7), (1, 3), (2, 1)]
    sources = np.array([encode_source(*place) for place in places])
    ledger.add(sources, np.array([1, 2, 2]), np.array([6.0, 8.0, 1.0]), np.array([3.0, 2.0, 1.0]))
    ledger.write(tmp_path / "ledger.parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "ledger.parquet").to_pylist()
    names = ("file", "line", "source", "first_loss", "mean_loss", "times", "last_step")
    assert [[row[name] for name in names] for row in rows] == [
        ["a.jsonl", 7, "a", 2.0, 2.0, 1, 1],
        ["b/one.csv", 3, "b", 4.0, 4.0, 1, 2],
        ["b/two.csv", 1, "b", 1.0, 1.0, 1, 2],
    ]


def test_another_parquet_file_is_no_ledger(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"line": [1]}), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("no")
    for name in ("other", "text"):
        with pytest.raises(ValueError, match=r"\.parquet"):
            RowLedger.read(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize(("losses", "state"), [
    ([4.0, 2.0, 3.0], "learned"),         # 3.0 ≤ 0.8 · 4.0
    ([4.0, 2.0, 3.5], "forgotten"),
    ([4.0, 3.5, 3.3], "never_learned"),
    ([4.0], None),                        # trained once: nothing is known
    ([0.1, 0.3, 0.5], "learned"),         # always below 0.8 · log 2
    ([0.1, 0.3, 0.6], "forgotten"),
    ([0.6, 0.59], "never_learned"),
])  # fmt: skip
def test_a_row_is_learned_forgotten_or_never_learned(losses, state):
    ledger = RowLedger(NOTE)
    for step, loss in enumerate(losses, 1):
        ledger.add(np.array([5]), np.array([step]), np.array([loss]), np.array([1.0]))
    ledger.merge()
    assert [name for name, values in ledger.states().items() if values[0]] == ([state] if state else [])


def test_a_ledger_of_an_earlier_version_is_read(tmp_path):
    ledger = RowLedger(NOTE)
    ledger.add(*observations())
    ledger.write(tmp_path / "ledger.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "ledger.parquet")
    note = {**json.loads(table.schema.metadata[b"ledger"]), "task_type": "sft", "columns": None}
    table = table.replace_schema_metadata({"ledger": json.dumps(note)})
    pyarrow.parquet.write_table(table, tmp_path / "earlier.parquet")
    assert RowLedger.read(tmp_path / "earlier.parquet").note == NOTE


def test_a_row_that_is_trained_late_is_judged_as_the_others():
    """The loss falls for all rows alike, and the rows of step 9 are seen when it is low already."""
    ledger = RowLedger(NOTE)
    for epoch in range(3):
        for step in range(10):
            loss = max(8.0 * 0.9 ** (10 * epoch + step), 3.3)
            ledger.add(np.arange(16) + 16 * step, np.full(16, 10 * epoch + step + 1), np.full(16, loss), np.ones(16))
    counts = ledger.counts()
    assert np.unique(ledger.start_losses()) == pytest.approx([np.median([8.0] * 16 + [7.2] * 16)])
    assert counts == {"rows": 160, "learned": 160, "forgotten": 0, "never_learned": 0}


def test_each_source_starts_at_its_own_loss():
    ledger = RowLedger(NOTE)
    sources = np.array([encode_source(0, 1), encode_source(0, 2), encode_source(1, 1), encode_source(2, 1)])
    ledger.add(sources, np.full(4, 1), np.array([2.0, 6.0, 9.0, 9.0]), np.ones(4))
    ledger.add(sources, np.full(4, 2), np.array([1.0, 3.3, 7.0, 7.3]), np.ones(4))
    ledger.merge()
    assert list(ledger.start_losses()) == [4.0, 4.0, 9.0, 9.0]
    assert list(ledger.states()["learned"]) == [True, False, True, False]  # 3.2 and 7.2


def test_a_source_starts_at_the_loss_of_its_first_20_rows():
    ledger = RowLedger(NOTE)
    for step in range(1, 31):
        ledger.add(np.array([step]), np.array([step]), np.array([100.0 - step]), np.array([1.0]))
    ledger.merge()
    assert set(ledger.start_losses()) == {100.0 - 10.5}
