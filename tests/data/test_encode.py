"""Rows are encoded in order, a chunk at a time, and none is lost."""

import copy

import pytest
import tiny
from conftest import write_rows

from utils.data.encode import EncodedChunk, RowEncoder, encode_files
from utils.data.parallel import CHUNK_SIZE
from utils.data.report import TOO_LONG, Dropped
from utils.template import get_template


def make_encoder(encode) -> RowEncoder:
    return RowEncoder(suffixes=(".jsonl",), read=lambda row: row["text"], encode=encode, key={})


def ids_of(texts):
    return [{"input_ids": [len(text)], "labels": [len(text)], "shortened": False} for text in texts]


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_come_in_the_files_order_with_their_places(tmp_path, workers):
    files = [write_rows(tmp_path / f"{n}.jsonl", [{"text": "x" * (i % 50)} for i in range(1500)]) for n in (1, 2)]
    parts = list(encode_files(files, make_encoder(ids_of), "auto", workers))
    assert [part.rows for part in parts] == [1000, 500, 1000, 500]
    ids = [row for part in parts for row in part.batch["input_ids"].to_pylist()]
    assert ids == [[i % 50] for i in range(1500)] * 2
    sources = [source for part in parts for (source,) in part.batch["source"].to_pylist()]
    assert sources == [*range(1, 1501), *(1 << 40 | line for line in range(1, 1501))]


def test_after_a_row_that_stops_the_run_the_rest_is_only_looked_through(tmp_path):
    rows = [{"text": "x"} for _ in range(3 * CHUNK_SIZE)]
    rows[5] = rows[-1] = {"text": "x", "bad": True}
    seen = []

    def read(row):
        from utils.data.bad_rows import BadRow

        if "bad" in row:
            raise BadRow("is bad")
        return row["text"]

    def encode(texts):
        seen.extend(texts)
        return ids_of(texts)

    encoder = RowEncoder(suffixes=(".jsonl",), read=read, encode=encode, key={})
    file = write_rows(tmp_path / "rows.jsonl", rows)
    parts = list(encode_files([file], encoder, "auto", 1))
    assert [str(row) for part in parts for row in part.refused] == [
        f"{file}:6 is bad",
        f"{file}:{3 * CHUNK_SIZE} is bad",
    ]
    assert seen == []


@pytest.mark.parametrize(
    "dropped, stops", [(Dropped("has nothing to train"), True), (Dropped("is long", TOO_LONG), False)]
)
def test_on_bad_row_error_stops_for_a_row_without_a_trained_token_but_not_for_a_long_one(tmp_path, dropped, stops):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}] * 2)
    encoder = make_encoder(lambda texts: [dropped, *ids_of(texts[1:])])
    (chunk,) = encode_files([file], encoder, "error", 1)
    assert [str(row) for row in chunk.refused] == ([f"{file}:1 has nothing to train"] if stops else [])
    (chunk,) = encode_files([file], encoder, "auto", 1)
    assert chunk.refused == [] and chunk.dropped == [(1, *dropped)]


def test_a_chunk_that_loses_rows_stops_the_run(tmp_path, monkeypatch):
    from utils.data import encode as data_encode

    monkeypatch.setattr(
        data_encode, "encode_chunk", lambda encoder, on_bad_row, chunk: EncodedChunk(chunk.file, len(chunk.rows))
    )
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(RuntimeError, match="of 3 rows, 0 are kept and 0 dropped"):
        list(encode_files([file], make_encoder(ids_of), "auto", 1))


@pytest.mark.parametrize("name", ["qwen", "auto"])
def test_a_row_with_every_usual_break_keeps_all_rows(tmp_path, name):
    """The 16 private-use characters that breaks are usually taken from: another one is."""
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    tokenizer.chat_template = get_template("qwen").to_jinja()
    template = get_template(name, tokenizer)
    odd = "".join(map(chr, range(0xE0F0, 0xE100))) + "<|im_end|>"
    row = [{"role": "user", "content": odd}, {"role": "assistant", "content": "c"}]
    encoder = RowEncoder((".jsonl",), lambda row: row["messages"], lambda rows: [
        {**one, "shortened": False} for one in template.encode_batch(rows, tokenizer)
    ], {})  # fmt: skip
    parts = list(encode_files([write_rows(tmp_path / "rows.jsonl", [{"messages": row}] * 3)], encoder, "auto", 1))
    ids = [ids for part in parts for ids in part.batch["input_ids"].to_pylist()]
    assert len(ids) == 3 and tokenizer.decode(ids[0]) == get_template("qwen").render(row)
    assert ids[0].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3
