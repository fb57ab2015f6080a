"""Indices of streamed files: every row is found by its place, in every kind of file."""

import gzip
import json
import os

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from utils.data import stream_index
from utils.data.files import parse_row, read_rows
from utils.data.stream_index import BATCHES, LINES, ROW_GROUPS, SEQUENTIAL, fingerprint, index_files
from utils.runtime.errors import UserError

ROWS = [{"instruction": f"Frage {i} ä", "output": "x" * (i % 7 + 1)} for i in range(23)]


def jsonl(path, ends="\n"):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    lines[4:4] = ["", "   "]
    path.write_bytes(("\ufeff" + ends.join(lines)).encode())


def odd_lines(path):
    """Lines that only Unicode knows as blank, a first line that is only a byte-order mark, and ends of all kinds."""
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    lines[4:4] = ["\u00a0", " \x1c", "\u2028\t"]
    text = "\ufeff\n" + "\n".join(lines[:9]) + "\r\r\n" + "\r".join(lines[9:15]) + "\n\r" + "\n".join(lines[15:])
    path.write_bytes(text.encode())


def parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=5)


def arrow(path):
    Dataset.from_list(ROWS).save_to_disk(str(path.parent / "saved"))
    next((path.parent / "saved").glob("*.arrow")).rename(path)


def arrow_file(path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def csv_file(path):
    path.write_text("instruction,output\n" + "".join(f'"{row["instruction"]}\nmore",{row["output"]}\n' for row in ROWS))


KINDS = {
    "rows.jsonl": (jsonl, LINES),
    "lines.json": (jsonl, LINES),
    "windows.jsonl": (lambda path: jsonl(path, "\r\n"), LINES),
    "old_mac.jsonl": (lambda path: jsonl(path, "\r"), LINES),
    "odd_lines.jsonl": (odd_lines, LINES),
    "rows.parquet": (parquet, ROW_GROUPS),
    "stream.arrow": (arrow, BATCHES),
    "file.arrow": (arrow_file, BATCHES),
    "rows.csv": (csv_file, SEQUENTIAL),
    "array.json": (lambda path: path.write_text(json.dumps(ROWS)), SEQUENTIAL),
    "rows.txt": (lambda path: path.write_text("a\nb\n\nc\n\n\nd"), SEQUENTIAL),
    "rows.jsonl.gz": (
        lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
        SEQUENTIAL,
    ),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(stream_index, "CHUNK_ROWS", 4)


def index(path, tmp_path):
    (found,) = index_files([str(path)], "--train_data_path", str(tmp_path / "cache"))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_every_row_is_found_by_its_place(name, tmp_path):
    write, how = KINDS[name]
    write(tmp_path / name)
    wanted = list(read_rows(str(tmp_path / name)))
    for _ in range(2):  # made, then from its file
        found = index(tmp_path / name, tmp_path)
        assert found.how == how and found.rows.sum() == len(wanted)
        if how != SEQUENTIAL:
            assert len(found.rows) > 3 and found.rows.max() <= 5
        chunks = [(found.read(chunk), count) for chunk, count in enumerate(found.rows.tolist())]
        assert [parse_row(rows[place]) for rows, count in chunks for place in range(count)] == wanted


def test_an_index_is_stored_and_made_anew_for_a_changed_file(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    jsonl(file)
    before = index(file, tmp_path)
    make = stream_index._index
    monkeypatch.setattr(stream_index, "_index", lambda *_: pytest.fail("it was counted again"))
    assert numpy.array_equal(index(file, tmp_path).places, before.places)
    monkeypatch.setattr(stream_index, "_index", make)
    file.write_text(file.read_text() + "\n" + json.dumps(ROWS[0]))
    assert index(file, tmp_path).rows.sum() == 24
    for content in (b"broken", b"PK\x03\x04 broken", b""):
        for stored in (tmp_path / "cache").glob("*.npz"):
            stored.write_bytes(content)
        assert index(file, tmp_path).rows.sum() == 24


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    jsonl(tmp_path / "rows.jsonl")
    found = index(tmp_path / "rows.jsonl", tmp_path)
    os.utime(tmp_path / "rows.jsonl", ns=(1, 1))
    with pytest.raises(UserError, match="was changed while it was read"):
        found.read(0)


@pytest.mark.parametrize("name", [name for name, (_, how) in KINDS.items() if how == SEQUENTIAL])
def test_a_large_file_that_is_only_read_from_its_start_is_refused(name, tmp_path, monkeypatch):
    KINDS[name][0](tmp_path / name)
    monkeypatch.setattr(stream_index, "MAX_SEQUENTIAL_BYTES", 5)
    with pytest.raises(UserError, match=r"can only be read from its start.*Parquet") as error:
        index(tmp_path / name, tmp_path)
    assert error.value.problems[0].flags == ("train_data_path",)


def test_a_large_array_on_one_line_is_not_read_to_be_refused(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS))
    monkeypatch.setattr(stream_index, "MAX_SEQUENTIAL_BYTES", 50)
    monkeypatch.setattr(stream_index, "has_a_row_a_line", lambda *_: pytest.fail("the line was read"))
    with pytest.raises(UserError, match="can only be read from its start"):
        index(tmp_path / "a.jsonl", tmp_path)


@pytest.mark.parametrize(("name", "text"), [("a.parquet", "no"), ("a.arrow", "no"), ("a.json", '[{"a": 1}, {')])
def test_a_broken_file_is_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError):
        index(tmp_path / name, tmp_path)


def test_a_fingerprint_covers_size_head_and_tail(tmp_path):
    file, found = tmp_path / "rows", []
    content = bytearray(b"a" * 1_000_000)
    for place in (None, 0, 999_999, 500_000 // 63 * 63):
        changed = bytearray(content)
        if place is not None:
            changed[place] = ord("b")
        file.write_bytes(changed)
        found.append(fingerprint(str(file)))
    file.write_bytes(content + b"a")
    assert len({*found, fingerprint(str(file))}) >= 4
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    assert fingerprint(str(file)) == found[0]  # a copy is the same file
