"""One writer at a time: a second run into the same folder is refused, and no crash leaves a lock behind."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, write_rows

import main_train
import utils.run.save
from utils.config import output_dir
from utils.runtime.errors import UserError
from utils.storage.run_lock import acquire, hold_lock, lock_holder, lock_path_for, release, run_lock_path

HOLD = (
    "import sys; from pathlib import Path; from utils.storage.run_lock import acquire\n"
    "acquire(Path(sys.argv[1]), '--output_dir x'); print('held', flush=True); sys.stdin.read()"
)


@contextlib.contextmanager
def held_by_another(lock):
    """Another process holds a lock; it, to be killed."""
    command = [sys.executable, "-c", HOLD, str(lock)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_lock_is_held_by_one_and_ends_with_its_process(tmp_path):
    lock = run_lock_path(tmp_path / "run")
    with held_by_another(lock) as other:
        told = rf"process {other.pid} on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        with pytest.raises(UserError, match=rf"--output_dir 'run' is in use by {told}; wait for it to end"):
            acquire(lock, "--output_dir 'run'")
        assert re.fullmatch(told, lock_holder(lock))
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert lock.exists() and lock_holder(lock) is None  # the file alone locks nothing
        acquire(lock, "--output_dir 'run'")
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        acquire(lock, "--output_dir 'run'")  # one's own
        assert lock_holder(lock) is None
    release(lock)
    assert list((tmp_path / "run").iterdir()) == []
    release(lock)


def test_a_process_that_ends_removes_its_lock(tmp_path):
    lock = run_lock_path(tmp_path)
    with held_by_another(lock) as other:
        other.stdin.close()
        assert other.wait() == 0 and not lock.exists()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    from utils.storage import run_lock

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    said = []
    monkeypatch.setattr(run_lock.logger, "warning", lambda text, *more: said.append(text.format(*more)))
    with hold_lock(run_lock_path(tmp_path), "--output_dir x"):
        assert lock_holder(run_lock_path(tmp_path)) is None
    assert "has no locks (Operation not supported)" in said[0] and list(tmp_path.iterdir()) == []


@pytest.fixture
def flags(tiny_models, rows_file):
    return ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--report_to", "none",
            "--max_steps", "1", "--card_samples", "0"]  # fmt: skip


@pytest.mark.parametrize("seen", ["at the start", "once the model is loaded"])
@pytest.mark.parametrize("more", [[], ["--overwrite_output_dir", "true"]], ids=["new", "overwrite"])
def test_a_second_run_into_a_folder_is_refused(seen, more, flags, refused, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    if seen != "at the start":
        monkeypatch.setattr(output_dir, "lock_holder", lambda _: None)
    else:
        monkeypatch.setattr(utils.run.save, "open_run_folder", lambda *_: pytest.fail("went on"))
    with held_by_another(run_lock_path(folder)) as other:
        said = refused(main_train.main, *flags, "--output_dir", str(folder), *more)
        assert f"error: --output_dir {str(folder)!r} is in use by process {other.pid} on " in said
        assert [path.name for path in folder.iterdir()] == [".run.lock"]


def test_what_another_run_finished_meanwhile_is_not_written_over(flags, refused, tmp_path, monkeypatch):
    """Two runs whose arguments were checked before either had written anything."""
    folder, claim_folder = tmp_path / "run", utils.run.save._claim_folder

    def meanwhile(*args):
        claim_folder(*args)
        (folder / "adapter_model.safetensors").write_text("theirs")

    monkeypatch.setattr(utils.run.save, "_claim_folder", meanwhile)
    assert "already holds" in refused(main_train.main, *flags, "--output_dir", str(folder))
    assert (folder / "adapter_model.safetensors").read_text() == "theirs"


def test_a_run_is_alone_while_it_trains_and_leaves_no_lock(train, monkeypatch, tmp_path):
    from transformers import Trainer

    seen, step = [], Trainer.training_step

    def training_step(*args, **kwargs):
        seen.append((tmp_path / "run" / ".run.lock").exists())
        if len(seen) == 3:
            raise RuntimeError("broken")
        return step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    folder = train("--max_steps", "2", "--card_samples", "0")
    assert seen == [True, True] and not (folder / ".run.lock").exists()
    with pytest.raises(RuntimeError, match="broken"):
        train("--max_steps", "2", "--card_samples", "0", "--overwrite_output_dir", "true")
    assert len(seen) == 3 and not (folder / ".run.lock").exists()


def test_merging_and_evaluating_are_alone_too(run_folder, train, refused, tmp_path, monkeypatch):
    from utils.script import evaluate, merge_lora

    adapter = train("--max_steps", "1", "--card_samples", "0")
    merged, output = tmp_path / "merged", tmp_path / "eval.jsonl"
    rows = write_rows(tmp_path / "eval_rows.jsonl", [{"instruction": "Hi", "output": "Hello!"}])
    monkeypatch.setattr("utils.export.merge.load_merged", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("utils.evaluate.evaluate.load_eval_models", lambda *_: pytest.fail("loaded"))
    for command, path, argv in (
        (merge_lora, merged, ["--model_path", str(adapter), "--output_dir", str(merged)]),
        (evaluate, output, ["--model_path", str(run_folder), "--eval_data_path", rows, "--output", str(output)]),
    ):
        with held_by_another(lock_path_for(path)) as other:
            assert f"is in use by process {other.pid} on " in refused(command.main, *argv)
        assert not path.exists()
