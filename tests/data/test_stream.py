"""Streamed rows: their order, what they are encoded as, and what is kept in memory."""

import copy
import importlib.metadata
import json

import numpy
import pytest
import tiny
from conftest import write_rows

from utils.args import parse_args
from utils.data import stream_index
from utils.data.stream import STREAM_REPORT, RowOrder
from utils.runtime.errors import UserError
from utils.tasks import get_task
from utils.template import get_template

SIZES = [4, 4, 3, 4, 4, 1, 4, 4, 9, 4, 2]


@pytest.mark.parametrize("buffer", [1, 3, 4, 10, 43, 1000, None])
def test_each_row_comes_once_and_any_part_is_found_by_its_position(buffer):
    order = RowOrder(SIZES, buffer, seed=5)
    for epoch in range(3):
        order.set_epoch(epoch)
        found = order.rows(0, 99)
        assert sorted(found) == list(range(43)) and len(order) == 43
        for start in range(0, 43, 7):
            fresh = RowOrder(SIZES, buffer, seed=5)
            fresh.set_epoch(epoch)
            assert fresh.rows(start, start + 11) == found[start : start + 11]
        if buffer is None:
            assert found == list(range(43))


def test_epochs_and_seeds_have_other_orders():
    orders = []
    for seed in (1, 2):
        order = RowOrder(SIZES, 10, seed)
        for epoch in (0, 1):
            order.set_epoch(epoch)
            orders.append(tuple(order.rows(0, 43)))
    assert len(set(orders)) == 4
    order = RowOrder([4] * 50, 1, seed=0)
    chunks = [[row // 4 for row in order.rows(0, 200)[::4]]]
    order.set_epoch(1)
    assert [row // 4 for row in order.rows(0, 200)[::4]] not in chunks


@pytest.mark.parametrize("buffer", [1, 4, 10, 20, 1000])
def test_rows_are_mixed_within_groups_of_about_the_buffer(buffer):
    order = RowOrder([4] * 500, buffer, seed=0)
    chunks = numpy.array(order.rows(0, 2000)) // 4
    largest = max(int(numpy.ptp(numpy.flatnonzero(chunks == chunk))) for chunk in range(500))
    assert largest < buffer + 4  # all rows of a chunk are within one group
    if buffer >= 20:
        assert largest > 4  # and mixed with those of others
    assert (numpy.diff(chunks[::4]) != 1).any()  # the chunks are mixed over all files


@pytest.mark.parametrize("buffer", [1, 4, 5, 10, 20])
def test_the_largest_group_bounds_the_chunks_that_are_read_in_turn(buffer):
    order = RowOrder(SIZES, buffer, seed=0)
    for epoch in range(20):
        order.set_epoch(epoch)
        assert numpy.diff([*order._groups, len(SIZES)]).max() <= order.largest_group()


@pytest.fixture
def load(tiny_models, tmp_path, tokenizer, monkeypatch):
    """Loads rows as main_train.py does; returns the task's Data."""
    monkeypatch.setattr(stream_index, "CHUNK_ROWS", 4)

    def run(paths, *flags, task="sft", template="qwen", tokenizer=tokenizer):
        argv = ["--train_args_path", f"train_args/{task}/base.py", "--model_name_or_path", tiny_models()]
        argv += ["--train_data_path", paths, "--output_dir", str(tmp_path / "run")]
        args, train_args = parse_args([*argv, "--cache_dir", str(tmp_path / "cache"), *flags])
        return get_task(train_args.task_types[0]).load_datasets(
            args, train_args, get_template(template, tokenizer), tokenizer
        )

    return run


STREAM = ("--streaming", "true", "--packing", "false", "--shuffle_buffer", "10")
PAIRS = [{"prompt": f"Q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
TEXTS = [{"text": f"some text {i}"} for i in range(20)]


@pytest.mark.parametrize(
    ("task", "rows"), [("sft", tiny.ROWS), ("dpo", PAIRS), ("pretrain", TEXTS)], ids=["sft", "dpo", "pretrain"]
)
def test_rows_are_encoded_as_prepared_ones(load, tmp_path, task, rows):
    half = len(rows) // 2
    files = [write_rows(tmp_path / "a.jsonl", rows[:half]), write_rows(tmp_path / "b.jsonl", rows[half:])]
    flags = STREAM[:4] if task != "dpo" else STREAM[:2]
    streamed, prepared = load(",".join(files), *flags, task=task), load(",".join(files), *flags[2:], task=task)
    assert streamed.rows_in_epoch() == prepared.rows_in_epoch() == len(rows)
    found = streamed.stream.encode(list(range(len(rows))))[0]
    found = [{name: value for name, value in found[number].items() if value is not None} for number in sorted(found)]
    assert found == list(prepared.train)  # which has no column for weights that no message has
    assert list(streamed.train) == list(prepared.train)  # the first rows, for the checks
    assert streamed.train.features == prepared.train.features


def test_no_row_is_written(load, tmp_path):
    load(write_rows(tmp_path / "a.jsonl", tiny.ROWS), *STREAM)
    assert [path.suffixes for path in (tmp_path / "cache").iterdir()] == [[".index", ".npz"]]


@pytest.mark.parametrize("template", ["qwen", "auto"])
def test_an_update_leaves_the_key_unless_it_encodes_in_another_way(load, tmp_path, tokenizer, monkeypatch, template):
    other, file = copy.deepcopy(tokenizer), write_rows(tmp_path / "a.jsonl", tiny.ROWS)
    tokenizer = copy.deepcopy(tokenizer)
    for each in (tokenizer, other):
        each.chat_template = get_template("qwen", each).to_jinja()
    other.add_tokens(["Paris"])
    monkeypatch.setattr("utils.data.encode.tokenizer_key", lambda *_: "")
    options = {"template": template, "tokenizer": tokenizer}
    before = load(file, *STREAM, **options).report.key
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99.9")
    monkeypatch.setattr("utils.data.cache._FORMAT_VERSION", 99)
    assert load(file, *STREAM, **options).report.key == before
    keys = {before, load(file, *STREAM, "--train_on", "last_turn", **options).report.key}
    assert len(keys | {load(file, *STREAM, template=template, tokenizer=other).report.key}) == 3


def test_a_dropped_row_leaves_its_place_empty_and_is_reported(load, tmp_path):
    rows = [*tiny.ROWS[:5], {"instruction": "empty", "output": ""}, *tiny.ROWS[5:9]]
    data = load(write_rows(tmp_path / "a.jsonl", rows), *STREAM)
    data.stream.empty = {"source": []}
    batch = data.stream.__getitems__([4, 5, 99])
    (report,) = batch[0].pop(STREAM_REPORT)
    assert batch[0]["source"] == [5] and batch[1:] == [{"source": []}] * 2
    assert report.rows == 2 and [line for line, *_ in report.dropped] == [6]


def test_a_bad_one_of_the_first_rows_is_refused_at_once(load, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([*map(json.dumps, tiny.ROWS), "{"]))
    with pytest.raises(UserError, match=f"a.jsonl:{len(tiny.ROWS) + 1}"):
        load(str(file), *STREAM)
    load(str(file), *STREAM, "--on_bad_row", "drop")


def test_a_misspelt_column_is_refused(load, tmp_path):
    rows = [{"frage": "Hi", "output": "Hello"}] * 3
    with pytest.raises(UserError, match="'fragen'"):
        load(write_rows(tmp_path / "a.jsonl", rows), *STREAM, "--on_bad_row", "drop",
             "--columns", '{"instruction": "fragen"}')  # fmt: skip


def test_few_chunks_are_in_memory_and_each_is_read_once(load, tmp_path, monkeypatch):
    rows = [{"instruction": f"Q {i}", "output": "A"} for i in range(400)]
    data = load(write_rows(tmp_path / "a.jsonl", rows), *STREAM)
    reads, read = [], stream_index.FileIndex.read
    monkeypatch.setattr(stream_index.FileIndex, "read", lambda self, chunk: reads.append(chunk) or read(self, chunk))
    data.stream._chunks.clear()
    for start in range(0, 400, 3):
        data.stream.encode(data.stream.order.rows(start, start + 3))
        assert len(data.stream._chunks) <= 5
    assert sorted(reads) == list(range(100))
