"""The order of an epoch's rows: shares, passes, and its end; compared with `datasets.interleave_datasets`."""

import math
import time

import numpy
import pytest
from datasets import Dataset, interleave_datasets

from utils.data.mixture import Mixture, format_mixture, format_times
from utils.data.sources import Source
from utils.runtime.errors import UserError


def mixture(sizes, strategy, weights=None, tokens=None, **options):
    settings = options.pop("settings", [{}] * len(sizes))
    weights = weights or [None] * len(sizes)
    sources = tuple(
        Source(f"{i}.jsonl", f"s{i}", w, **more) for i, (w, more) in enumerate(zip(weights, settings, strict=True))
    )
    return Mixture(sources, tuple(sizes), tuple(tokens or [10.0] * len(sizes)), strategy, **options)


def sources_of(found, rows):
    """The source of each row."""
    return numpy.searchsorted(numpy.cumsum(found.sizes), rows, side="right")


def test_concat_has_every_row_once_in_a_new_order_each_epoch():
    found = mixture([5, 8, 1], "concat")
    first, second = found.indices(0), found.indices(1)
    assert sorted(first) == sorted(second) == list(range(14)) and list(first) != list(second)
    assert list(found.indices(0)) == list(first)  # a function of the epoch alone
    assert list(mixture([5, 8, 1], "concat", seed=7).indices(0)) != list(first)


def test_repeat_and_rows():
    found = mixture([10, 8], "concat", settings=[{"repeat": 2.5}, {"rows": 3, "repeat": 2}])
    assert found.counts == (25, 6)
    rows = found.indices(2)
    times = numpy.bincount(rows, minlength=18)
    assert sorted(times[:10]) == [2] * 5 + [3] * 5
    assert sorted(times[10:]) == [0] * 5 + [2] * 3  # the same three, twice
    assert set(rows[rows >= 10]) != set(found.indices(3)[found.indices(3) >= 10])  # others in the next epoch
    own = rows[rows < 10]
    assert sorted(own[:10]) == sorted(own[10:20]) == list(range(10))  # pass after pass


@pytest.mark.parametrize(("sizes", "strategy", "options"), [
    ([150, 20], "concat", {"settings": [{"rows": 15}, {}]}),
    ([150, 20], "concat", {"settings": [{"rows": 70}, {"repeat": 0.3}]}),
    ([150, 20], "concat", {"settings": [{}, {"repeat": 2.7}]}),
    ([1000, 100], "weighted", {"weights": [0.5, 0.5]}),
    ([100, 31], "weighted", {"weights": [0.7, 0.3], "stop": "all_exhausted"}),
    ([50, 7], "interleave", {"stop": "all_exhausted"}),
    ([50, 7], "interleave", {}),
])  # fmt: skip
def test_over_the_epochs_a_row_comes_again_only_after_all_others_of_its_source(sizes, strategy, options):
    found = mixture(sizes, strategy, **options)
    start = 0
    for size, count in zip(sizes, found.counts, strict=True):
        times, orders = numpy.zeros(size, int), set()
        for epoch in range(12):
            rows = found.indices(epoch)
            rows = rows[(rows >= start) & (rows < start + size)] - start
            assert len(rows) == count and (len(set(rows)) == min(count, size))  # none twice before all have come
            orders.add(tuple(rows))
            for row in rows:
                times[row] += 1
                assert times[row] == times.min() + 1 or times.min() == times.max()
        assert times.max() - times.min() <= 1 and len(orders) == 12
        start += size


def test_rows_that_an_epoch_repeats_are_others_in_the_next():
    found = mixture([10], "concat", settings=[{"rows": 4, "repeat": 3}])
    times = numpy.zeros(10, int)
    for epoch in range(5):
        rows = found.indices(epoch)
        assert len(set(rows)) == 4 and all(set(rows[part : part + 4]) == set(rows) for part in (0, 4, 8))
        times += numpy.bincount(rows, minlength=10)
    assert list(times) == [6] * 10


def test_a_small_source_is_repeated_without_a_pass_for_each_row():
    found, started = mixture([1, 200_000], "interleave", stop="all_exhausted"), time.process_time()
    rows = found.indices(1)
    assert time.process_time() - started < 5 and (rows == 0).sum() == 200_000


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
def test_interleave_takes_the_sources_in_turn_as_datasets_does(stop):
    sizes = [3, 5, 4]
    found = mixture(sizes, "interleave", stop=stop)
    parts = [Dataset.from_dict({"source": [number] * size}) for number, size in enumerate(sizes)]
    theirs = interleave_datasets(parts, stopping_strategy=stop)["source"]
    rows = found.indices(2)
    assert list(sources_of(found, rows)) == list(theirs)
    times = numpy.bincount(rows, minlength=12)
    assert (times[:3] == 1).all() if stop == "first_exhausted" else times.min() >= 1


@pytest.mark.parametrize(("stop", "counts"), [("first_exhausted", (70, 30)), ("all_exhausted", (700, 300))])
def test_weighted_ends_with_the_first_or_the_last_source(stop, counts):
    found = mixture([70, 300], "weighted", [0.7, 0.3], stop=stop)
    assert found.counts == counts
    times = numpy.bincount(found.indices(0), minlength=370)
    if stop == "first_exhausted":
        assert times.max() == 1 and (times[:70] == 1).all()
    else:
        assert (times[70:] == 1).all() and (times[:70] == 10).all()


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, 0.3, 0.5], [1, 7, 2], [0.61, 0.02, 3]])
def test_a_source_is_never_short_of_rows_nor_are_shares_off_by_a_row(weights, stop):
    sizes = [50, 61, 997]
    found = mixture(sizes, "weighted", weights, stop=stop)
    shares = numpy.array(weights) / sum(weights)
    assert (abs(numpy.array(found.counts) - len(found) * shares) <= 1).all()
    used_up = numpy.array(found.counts) >= sizes
    assert used_up.any() and (used_up.all() if stop == "all_exhausted" else (numpy.array(found.counts) <= sizes).all())


def test_shares_of_any_part_of_an_epoch_are_within_binomial_bounds():
    found, share = mixture([2000, 3000], "weighted", [0.3, 0.7], stop="all_exhausted"), 0.3
    for epoch in range(20):
        drawn = sources_of(found, found.indices(epoch)) == 0
        for part in (drawn[:500], drawn[1000:2000], drawn):
            bound = 5 * math.sqrt(share * (1 - share) / len(part))
            assert abs(part.mean() - share) < bound


def test_shares_of_tokens():
    found = mixture([1000, 1000], "weighted", [1, 1], tokens=[10.0, 90.0], unit="tokens")
    by_rows = mixture([1000, 1000], "weighted", [1, 1], tokens=[10.0, 90.0])
    assert found.counts == (1000, 111) and by_rows.counts == (1000, 1000)
    first, second = found.table()
    assert first["share_of_tokens"] == pytest.approx(0.5, abs=1e-3) and second["share_of_rows"] == pytest.approx(
        0.1, abs=1e-3
    )


@pytest.mark.parametrize(("sizes", "options"), [
    ([5, 5], {"settings": [{"rows": 6}, {}], "strategy": "concat"}),
    ([1000, 1], {"weights": [1e-9, 1], "strategy": "weighted"}),
    ([5, 5], {"settings": [{"repeat": 0.01}, {}], "strategy": "concat"}),
])  # fmt: skip
def test_a_source_that_gives_no_row_or_too_few_is_refused(sizes, options):
    with pytest.raises(UserError):
        mixture(sizes, options.pop("strategy"), options.pop("weights", None), **options)


@pytest.mark.parametrize(("strategy", "options", "named"), [
    ("weighted", {"weights": [1, 1e-9], "stop": "all_exhausted"}, "'s0'"),
    ("weighted", {"weights": [1, 5e-324], "stop": "all_exhausted"}, "'s0'"),
    ("concat", {"settings": [{}, {"repeat": 1e11}]}, "'s1'"),
    ("concat", {"settings": [{}, {"repeat": 1e300}]}, "'s1'"),
    ("concat", {"settings": [{}, {"repeat": 1.7e308}]}, "'s1'"),
])  # fmt: skip
def test_an_epoch_of_too_many_rows_is_refused_by_its_source(strategy, options, named):
    with pytest.raises(UserError) as error:
        mixture([20, 40], strategy, **options)
    assert named in str(error.value) and "2,147,483,648" in str(error.value)


def test_large_weights_are_shares():
    assert mixture([20, 40], "weighted", [1e308, 1.5e308]).counts == (20, 30)


def test_what_was_drawn_equals_the_rows_of_the_order():
    found = mixture([20, 30, 12], "weighted", [5, 3, 2], stop="all_exhausted")
    for rows in ([len(found), 7], [len(found) - 2, len(found) - 2], [0], []):
        ordered = [found.indices(epoch)[:count] for epoch, count in enumerate(rows)]
        drawn = numpy.concatenate([numpy.array([], int), *ordered])
        assert list(found.count_drawn(rows)) == list(numpy.bincount(sources_of(found, drawn), minlength=3))


def test_the_table_and_the_name():
    found = mixture([20, 30], "weighted", [0.7, 0.3], tokens=[10.0, 20.0])
    assert found.table()[0] == {
        "source": "s0", "rows": 20, "packed": False, "share_of_rows": 20 / 28, "tokens": 200,
        "share_of_tokens": 200 / 360, "epochs": 1.0,
    }  # fmt: skip
    assert format_mixture(found.table())[1] == "s1: 8 rows (28.6 %), 160 tokens (44.4 %), 0.267 times its rows"
    changed = [mixture([20, 30], "weighted", [0.7, 0.3], unit="tokens"), mixture([20, 30], "weighted", [0.6, 0.3]),
               mixture([20, 30], "weighted", [0.7, 0.3], stop="all_exhausted"),
               mixture([20, 30], "weighted", [0.7, 0.3], settings=[{"rows": 3}, {}]),
               mixture([20, 30], "concat"), mixture([20, 30], "concat", settings=[{"repeat": 2}, {}])]  # fmt: skip
    assert len({found.name, *(one.name for one in changed)}) == 7
    close = [{"rows": 1234567}, {"rows": 1234568}, {"repeat": 1.0000001}, {"repeat": 1.0000002}, {"repeat": 2.0}]
    names = [mixture([2_000_000], "concat", settings=[setting]).name for setting in close]
    assert len(set(names)) == 5 and "(rows 1234567)" in names[0] and "(repeat 2)" in names[4]


@pytest.mark.parametrize(("packed", "line"), [
    (False, "s0: 1 row (0.0 %), 1 token (0.0 %), 1 times its rows"),
    (True, "s0: 1 packed row (0.0 %), 1 token (0.0 %), 1 times its packed rows"),
])  # fmt: skip
def test_numbers_of_rows_are_named_as_they_are(packed, line):
    found = mixture([1, 3], "concat", tokens=[1.0, 1.0], packed=packed)
    assert format_mixture([{**found.table()[0], "share_of_rows": 0.0, "share_of_tokens": 0.0}]) == [line]
    assert [format_times(value) for value in (0.26667, 2.0, 99.4, 123.4, 3e5)] == [
        "0.267", "2", "99.4", "123", "300,000",
    ]  # fmt: skip
