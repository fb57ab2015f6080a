"""Proofs with runs of their own fail on the fault that each is for, and end every process they start."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import tiny
from conftest import ROOT, write_rows

from utils.prove.arguments import make_subject
from utils.prove.figures import DoesNotApply, ProofFailed, Verdict
from utils.prove.run_checks import kill_tree, ranks, resumed, run_training

FAULTS = {
    # the checkpoint's moments of Adam are not read
    "optimizer": "transformers.Trainer._load_optimizer_and_scheduler = lambda *_: None",
    # an epoch begins anew where it was broken off
    "order": "transformers.trainer.skip_first_batches = lambda batches, *_: batches",
    # every process trains on the first one's share
    "shares": """
shards = accelerate.data_loader.BatchSamplerShard
sound = shards.__iter__
def same(self):
    self.process_index = 0
    return sound(self)
shards.__iter__ = same
""",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A subject whose undisturbed run serves all the tests of this kind."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_rows(folder / "rows.jsonl", tiny.ROWS)
    flags = ["--model_name_or_path", tiny.save_tiny_model(folder / "base"), "--train_data_path", data]
    return make_subject([*flags, "--cache_dir", str(folder / "kept"), "--learning_rate", "1e-2"], 8, folder)


@pytest.fixture
def check(runs, tmp_path, monkeypatch):
    """Tries a proof, with a fault planted in the processes it starts."""

    def run(function, fault=""):
        for name in ("resumed", "ranks"):
            shutil.rmtree(runs.scratch / name, ignore_errors=True)
        planted = "import sys\nif 'torch.distributed.run' not in sys.orig_argv:\n    import accelerate, transformers\n"
        planted += "".join(f"    {line}\n" for line in FAULTS.get(fault, "").splitlines())
        (tmp_path / "sitecustomize.py").write_text(planted, encoding="utf-8")
        if fault:
            monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return Verdict(function(runs))

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize(
    ("function", "fault"), [(resumed, ""), (resumed, "optimizer"), (resumed, "order"), (ranks, ""), (ranks, "shares")]
)
def test_resumed_runs_and_ranks(check, function, fault):
    verdict = check(function, fault)
    assert verdict.holds is not bool(fault)
    assert [measure.what.split(" of ")[0] for measure in verdict.measures][0] == "loss"


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_a_run_that_fails_names_the_reason(runs):
    with pytest.raises(ProofFailed, match="exit code 2: error: --lora_rank 0 is not allowed"):
        run_training(runs, "wrong", ["--lora_rank", "0"])


def ends(process: psutil.Process) -> bool:
    """Whether a killed process ends: the kernel sends the signal at once and ends it a little later."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for _ in range(200):
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.05)
        return False
    return True


@pytest.mark.slow
def test_a_stopped_command_ends_its_runs_and_removes_its_folders(flags, tmp_path):
    # rows are prepared here, so that the only processes are the runs
    make_subject(flags, 4, tmp_path)
    words = [sys.executable, "-m", "utils.script.prove", *flags, "--only", "ranks"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as command:
        children = []
        while not children and command.poll() is None:
            children = psutil.Process(command.pid).children(recursive=True)
            time.sleep(0.1)
        command.send_signal(signal.SIGTERM)
        command.wait(60)
    assert command.returncode == 143 and children
    assert all(ends(child) for child in children)
    assert not list(tmp_path.glob("llm_dojo-prove-*"))


WORKER = "import subprocess, sys; subprocess.run(['sleep', '100'], start_new_session=True)"


def test_workers_in_sessions_of_their_own_are_killed():
    with subprocess.Popen([sys.executable, "-c", WORKER]) as launcher:
        while not (workers := psutil.Process(launcher.pid).children()):
            time.sleep(0.05)
        kill_tree(launcher.pid)
    assert launcher.returncode == -signal.SIGKILL
    assert ends(workers[0])


@pytest.mark.parametrize(
    ("setting", "said"),
    [({"attention_dropout": 0.1}, r"attention_dropout 0\.1"), ({"output_router_logits": True}, "within a process")],
)
def test_ranks_do_not_apply_to_models_that_draw_random_numbers(tiny_models, rows_file, tmp_path, setting, said):
    flags = ["--model_name_or_path", tiny_models(**setting), "--train_data_path", rows_file]
    with pytest.raises(DoesNotApply, match=said):
        ranks(make_subject([*flags, "--cache_dir", str(tmp_path)], 4, tmp_path))
