"""Chunks are encoded in several processes: in order, a few ahead, and none outlives the run."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, write_rows

from utils.data.encode import RowEncoder, encode_files
from utils.data.parallel import CHUNK_SIZE
from utils.runtime.errors import UserError


def make_encoder(encode) -> RowEncoder:
    return RowEncoder(suffixes=(".jsonl",), read=lambda row: row["text"], encode=encode, key={})


def ids_of(texts):
    return [{"input_ids": [len(text)], "labels": [len(text)], "shortened": False} for text in texts]


def test_a_process_that_is_killed_is_told_and_none_stays_behind(tmp_path):
    def die(texts):
        os.kill(os.getpid(), signal.SIGKILL)

    file = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}] * 10)
    with pytest.raises(UserError, match="--dataset_num_proc 1"):
        list(encode_files([file], make_encoder(die), "auto", 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_no_row_is_lost_silently(tmp_path, workers):
    """Neither at an iterator that ends within the work, nor where a chunk gives fewer rows than it had."""
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}] * (2 * CHUNK_SIZE))
    encoder = make_encoder(lambda texts: next(iter([])))
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(encode_files([file], encoder, "auto", workers))


@pytest.mark.parametrize(("terminal", "allowed"), [(True, True), (False, True), (True, False)])
def test_a_progress_bar_is_shown_on_a_terminal_only(tmp_path, monkeypatch, terminal, allowed):
    """In a file its states would stay, with the next line of the log behind them."""
    shown = io.StringIO()
    shown.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("utils.data.parallel._DELAY", 0)
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}] * (5 * CHUNK_SIZE))
    encoder = dataclasses.replace(make_encoder(ids_of), shows_progress=allowed)
    assert sum(chunk.rows for chunk in encode_files([file], encoder, "auto", 1)) == 5 * CHUNK_SIZE
    assert ("tokenising" in shown.getvalue()) == (terminal and allowed)
    assert shown.getvalue() == "" or shown.getvalue().endswith("\r")  # cleared


def test_only_some_chunks_are_read_ahead(tmp_path):
    """What is in memory does not grow with the files."""
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}] * (20 * CHUNK_SIZE))
    read = []

    def encode(texts):
        read.append(len(texts))
        return ids_of(texts)

    parts = encode_files([file], make_encoder(encode), "auto", 1)
    next(parts)
    assert read == [CHUNK_SIZE]
    parts.close()


SLOW = """
import os, sys, time
sys.path[:0] = ["{root}"]
from utils.data.encode import RowEncoder, encode_files

def encode(texts):
    print(os.getpid(), flush=True)
    time.sleep(1000)

encoder = RowEncoder((".jsonl",), lambda row: row["text"], encode, {{}})
list(encode_files(["{file}"], encoder, "auto", 2))
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
