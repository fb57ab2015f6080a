"""Rows are encoded in one pass: the same labels with and without offsets, and processes that fail are told."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from conftest import ROOT, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.conversations import to_messages
from utils.data.encode import Part, RowKind, encoded_parts
from utils.data.parallel import CHUNK_SIZE
from utils.runtime.errors import UserError
from utils.template import get_template
from utils.template.tokenize import (
    Segment,
    _encode_texts,
    _label_ranges,
    encode_segments,
    label_spans,
    pick_escape_char,
)

TEXT = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from(" \n🙂é你好<|im_end|>"), max_size=12)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=6))
def test_labels_by_ranges_are_those_by_offsets(pieces):
    """Where `_label_ranges` answers at all, it says what the plain walk over the offsets says."""
    tokenizer, text, spans = tiny.byte_level_tokenizer(), "", []
    for piece, trained in pieces:
        if trained and piece:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    encoding = _encode_texts([text], tokenizer)[0]
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoding.ids == plain["input_ids"]
    labels = _label_ranges(encoding, encoding.ids, spans)
    special = frozenset(tokenizer.added_tokens_decoder)
    assert labels in (None, label_spans(plain["input_ids"], plain["offset_mapping"], spans, special))


def test_ranges_serve_every_family(tokenizer):
    """The quick way is the one that is taken, or it would be quick for nobody."""
    template = get_template("qwen", tokenizer)
    for row in tiny.ROWS:
        segments = list(template.segments(to_messages(row)))
        text = "".join(segment.text for segment in segments)
        ends = [sum(len(s.text) for s in segments[:i]) for i in range(len(segments) + 1)]
        spans = [(ends[i], ends[i + 1]) for i, segment in enumerate(segments) if segment.trained]
        encoding = _encode_texts([text], tokenizer)[0]
        assert _label_ranges(encoding, encoding.ids, spans) is not None


@pytest.mark.parametrize("text", ["a  b", "a\n\n\nb", "🙂🙂", "the fox"])
def test_a_token_that_crosses_the_end_of_an_answer(tokenizer, text):
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = plain["input_ids"], plain["offset_mapping"]
    for cut in range(1, len(text)):
        for trained, span in ((False, (cut, len(text))), (True, (0, cut))):
            row = encode_segments([[Segment(text[:cut], trained), Segment(text[cut:], not trained)]], tokenizer)[0]
            assert row == {"input_ids": ids, "labels": label_spans(ids, offsets, [span])}


def test_settings_left_in_the_tokenizer_do_not_count(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    whole = encode_segments([[Segment("a long enough text")]], tokenizer)
    tokenizer(["a long text"], truncation=True, max_length=2, padding="max_length")
    assert encode_segments([[Segment("a long enough text")]], tokenizer) == whole


def kind_of(encode) -> RowKind:
    return RowKind(suffixes=(".jsonl",), read=lambda row: row["text"], encode=encode, key={})


def ids_of(texts):
    return [{"input_ids": [len(text)], "labels": [len(text)], "shortened": False} for text in texts]


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_come_in_the_files_order_with_their_places(tmp_path, workers):
    files = [write_rows(tmp_path / f"{n}.jsonl", [{"text": "x" * (i % 50)} for i in range(1500)]) for n in (1, 2)]
    parts = list(encoded_parts(files, kind_of(ids_of), "auto", workers))
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
        from utils.data.conversations import BadRow

        if "bad" in row:
            raise BadRow("is bad")
        return row["text"]

    def encode(texts):
        seen.extend(texts)
        return ids_of(texts)

    kind = RowKind(suffixes=(".jsonl",), read=read, encode=encode, key={})
    file = write_rows(tmp_path / "rows.jsonl", rows)
    parts = list(encoded_parts([file], kind, "auto", 1))
    assert [p for part in parts for p in part.refused] == [f"{file}:6 is bad", f"{file}:{3 * CHUNK_SIZE} is bad"]
    assert seen == []


def test_a_process_that_is_killed_is_told_and_none_stays_behind(tmp_path):
    def die(texts):
        os.kill(os.getpid(), signal.SIGKILL)

    file = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}] * 10)
    with pytest.raises(UserError, match="--dataset_num_proc 1"):
        list(encoded_parts([file], kind_of(die), "auto", 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_no_row_is_lost_silently(tmp_path, workers):
    """Neither at an iterator that ends within the work, nor where a chunk gives fewer rows than it had."""
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}] * (2 * CHUNK_SIZE))
    kind = kind_of(lambda texts: next(iter([])))
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(encoded_parts([file], kind, "auto", workers))


def test_a_chunk_that_loses_rows_stops_the_run(tmp_path, monkeypatch):
    from utils.data import encode as data_encode

    monkeypatch.setattr(data_encode, "encode_chunk", lambda kind, on_bad_row, chunk: Part(chunk.file, len(chunk.rows)))
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(RuntimeError, match="of 3 rows, 0 are kept and 0 dropped"):
        list(encoded_parts([file], kind_of(ids_of), "auto", 1))


PRIVATE = [
    chr(code) for codes in ((0xE000, 0xF900), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE)) for code in range(*codes)
]


@pytest.mark.parametrize("name", ["qwen", "auto"])
def test_a_row_with_every_usual_break_keeps_all_rows(tmp_path, name):
    """The 16 private-use characters that breaks are usually taken from: another one is."""
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    tokenizer.chat_template = get_template("qwen").to_jinja()
    template = get_template(name, tokenizer)
    odd = "".join(map(chr, range(0xE0F0, 0xE100))) + "<|im_end|>"
    row = [{"role": "user", "content": odd}, {"role": "assistant", "content": "c"}]
    kind = RowKind((".jsonl",), lambda row: row["messages"], lambda rows: [
        {**one, "shortened": False} for one in template.encode_batch(rows, tokenizer)
    ], {})  # fmt: skip
    parts = list(encoded_parts([write_rows(tmp_path / "rows.jsonl", [{"messages": row}] * 3)], kind, "auto", 1))
    ids = [ids for part in parts for ids in part.batch["input_ids"].to_pylist()]
    assert len(ids) == 3 and tokenizer.decode(ids[0]) == get_template("qwen").render(row)
    assert ids[0].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


def test_every_private_use_character_may_be_the_break():
    assert pick_escape_char("".join(PRIVATE[:-1])) == PRIVATE[-1]
    assert pick_escape_char("".join(PRIVATE).replace("\uf8ff", "")) == "\uf8ff"
    with pytest.raises(UserError, match="every private-use character"):
        pick_escape_char("".join(PRIVATE))


def test_only_some_chunks_are_read_ahead(tmp_path):
    """What is in memory does not grow with the files."""
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}] * (20 * CHUNK_SIZE))
    read = []

    def encode(texts):
        read.append(len(texts))
        return ids_of(texts)

    parts = encoded_parts([file], kind_of(encode), "auto", 1)
    next(parts)
    assert read == [CHUNK_SIZE]
    parts.close()


SLOW = """
import os, sys, time
sys.path[:0] = ["{root}"]
from utils.data.encode import RowKind, encoded_parts

def encode(texts):
    print(os.getpid(), flush=True)
    time.sleep(1000)

kind = RowKind((".jsonl",), lambda row: row["text"], encode, {{}})
list(encoded_parts(["{file}"], kind, "auto", 2))
"""


@pytest.mark.slow
def test_no_process_outlives_a_run_that_is_killed(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}] * 10)
    run = subprocess.Popen([sys.executable, "-c", SLOW.format(root=ROOT, file=file)], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    run.kill()
    run.wait()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
