"""Runs that survive: killed, stopped, out of disk, with a loss of NaN, resumed with other settings."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import ROOT, write_rows
from fork_server import fast_processes
from safetensors.torch import load_file

import main_train
from benchmarks.matrix import free_port, two_processes
from utils.runtime.errors import UserError
from utils.storage.run_folder import (
    checkpoints_of,
    mark_complete,
    mark_incomplete,
    read_manifest,
    remove_incomplete_checkpoints,
    rotate_checkpoints,
)

SHORT = [
    "--precision", "fp32", "--max_steps", "8", "--per_device_train_batch_size", "2", "--save_steps", "2",
    "--lora_dropout", "0.1", "--report_to", "none", "--disable_tqdm", "true", "--card_samples", "0",
]  # fmt: skip


@pytest.fixture
def flags(tiny_models, rows_file):
    return ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, *SHORT]


# ---------------------------------------------------------------------- killed
@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_killed_at_twenty_moments_a_run_ends_the_same(flags, tmp_path):
    """SIGKILL between writes, in the middle of them, between steps; one checkpoint kept. Bit for bit."""
    (tmp_path / "scratch").mkdir()
    command = [sys.executable, str(ROOT / "tests/helpers/kill_often.py"), str(tmp_path / "scratch"), "20", *flags]
    done = subprocess.run([*command, "--save_total_limit", "1"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len({result["chance"] for result in results}) == 20
    assert all(result["killed"] == -signal.SIGKILL for result in results)
    assert [result for result in results if not result["same"]] == []
    assert len({tuple(result["whole"]) for result in results}) > 3  # at all ages of the run
    # once there was a whole checkpoint, there always is one
    assert all(result["whole"] for result in results if result["chance"] > 0.35 * result["of"])


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_rank_that_dies_takes_the_other_with_it_and_the_run_goes_on(flags, tmp_path, zero):
    """Rank 1 is killed after a first checkpoint was whole; resumed, the run ends within 1e-5 of an undisturbed one."""
    half = flags.index("--per_device_train_batch_size") + 1
    two = [*flags[:half], "1", *flags[half + 1 :], "--train_special_tokens", "off"]
    run = ["main_train.py", "--deepspeed", zero, *two]
    with fast_processes():
        whole = two_processes([*run, "--output_dir", str(tmp_path / "whole")])
    assert whole.returncode == 0, whole.stderr[-3000:]
    os.environ["KILL_RANK"] = "1"
    try:
        killed = two_processes(
            ["tests/helpers/killing.py", "SIGKILL", "14", *run, "--output_dir", str(tmp_path / "killed")]
        )
    finally:
        del os.environ["KILL_RANK"]
    assert killed.returncode != 0
    pids = re.findall(r"process (\d+) spawned", killed.stdout + killed.stderr)
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    left = [path.name for path in checkpoints_of(tmp_path / "killed") if read_manifest(path)]
    assert left and "checkpoint-8" not in left
    with fast_processes():
        resumed = two_processes([*run, "--resume_from_checkpoint", "true", "--output_dir", str(tmp_path / "killed")])
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_two_processes_go_on_in_the_middle_of_a_later_epoch(flags, tmp_path):
    """With the rows of that epoch: the losses of its last steps are those of the undisturbed run."""
    half = flags.index("--per_device_train_batch_size") + 1
    run = [
        *flags[:half],
        "1",
        *flags[half + 1 :],
        "--logging_steps",
        "1",
        "--save_steps",
        "1",
        "--save_total_limit",
        "99",
    ]
    run = ["main_train.py", "--deepspeed", "zero0", *run, "--num_train_epochs", "2"]
    whole, later = tmp_path / "whole", tmp_path / "later"
    assert two_processes([*run, "--output_dir", str(whole)]).returncode == 0
    state = json.loads((whole / "trainer_state.json").read_text())
    middle = state["max_steps"] * 3 // 4
    assert state["epoch"] == 2
    more = ["--resume_from_checkpoint", str(whole / f"checkpoint-{middle}"), "--output_dir", str(later)]
    done = two_processes([*run, *more])
    assert done.returncode == 0, done.stderr[-3000:]

    def losses(folder):
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["loss"] for entry in history if "loss" in entry and entry["step"] > middle}

    assert len(losses(whole)) == state["max_steps"] - middle
    assert losses(later) == pytest.approx(losses(whole), abs=1e-5)


# ---------------------------------------------------------------------- stopped
@pytest.fixture
def stopped_run(flags, tmp_path):
    """Runs in a process of its own that gets signals at one of its moments, by default an early one."""

    def run(*signums, more=(), chance=5):
        script = (
            "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/helpers']\n"
            "from pathlib import Path\nfrom kill_often import Chances\nimport main_train\n"
            "from utils.runtime.command import run_command\n"
            f"chances = Chances(Path('/nowhere'), {chance}, *map(int, sys.argv[2].split(',')))\n"
            "chances.install()\nrun_command(lambda: main_train.main(sys.argv[3:]))\n"
        )
        told = ",".join(str(int(signum)) for signum in signums)
        words = [sys.executable, "-c", script, str(ROOT), told, *flags, "--output_dir", str(tmp_path / "run")]
        return subprocess.run([*words, "--save_steps", "100", *more], capture_output=True, text=True, timeout=300)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_after_the_step_with_a_checkpoint(stopped_run, train, flags, tmp_path, signum, code):
    done = stopped_run(signum)
    assert done.returncode == code, done.stderr[-2000:]
    assert "stopped after step" in done.stderr and "--resume_from_checkpoint true" in done.stderr
    (checkpoint,) = checkpoints_of(tmp_path / "run")
    assert read_manifest(checkpoint) and not (tmp_path / "run" / "train_args.json").exists()
    main_train.main([*flags, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "true"])
    main_train.main([*flags, "--output_dir", str(tmp_path / "whole")])
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_a_second_ctrl_c_leaves_at_once(stopped_run, tmp_path):
    done = stopped_run(signal.SIGINT, signal.SIGINT)
    assert done.returncode == 130 and "interrupted. No checkpoint is saved yet" in done.stderr
    assert not checkpoints_of(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_a_second_ctrl_c_names_the_checkpoint_to_continue_from(stopped_run, tmp_path):
    done = stopped_run(signal.SIGINT, signal.SIGINT, more=("--save_steps", "1"), chance=30)
    newest = [path for path in checkpoints_of(tmp_path / "run") if read_manifest(path)][-1]
    assert done.returncode == 130 and f"The newest checkpoint is {newest}. To continue" in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_a_second_ctrl_c_leaves_at_once_after_a_sigterm_too(stopped_run, tmp_path):
    assert stopped_run(signal.SIGTERM, signal.SIGINT, signal.SIGINT).returncode == 130
    assert not checkpoints_of(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_the_checkpoint_of_a_stop_is_kept_beside_the_best(stopped_run, tmp_path):
    """transformers' own limit would leave the best alone at the end of the training."""
    best = ["--val_size", "2", "--eval_steps", "1", "--load_best_model_at_end", "true", "--save_total_limit", "1"]
    done = stopped_run(
        signal.SIGINT, more=[*best, "--save_steps", "1", "--learning_rate", "0.5", "--warmup_steps", "0"]
    )
    assert done.returncode == 130, done.stderr[-2000:]
    step = int(re.search(r"stopped after step (\d+)", done.stderr)[1])
    assert read_manifest(tmp_path / "run" / f"checkpoint-{step}")


@pytest.mark.slow
def test_a_sigterm_to_the_deepspeed_command_saves_and_leaves_nothing_behind(flags, tmp_path):
    """That command dies without a word to its launcher, which would train on alone."""
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--master_port",
        free_port(),
        "--include",
        "localhost:0,1",
    ]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    run = [*flags, "--max_steps", "100000", "--save_steps", "100000", "--logging_steps", "1"]
    words = [*command, "main_train.py", *run, "--output_dir", str(tmp_path / "run")]
    with open(tmp_path / "said.txt", "w+") as said:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None and "{'loss'" not in Path(said.name).read_text():
            time.sleep(0.2)
        process.terminate()
        process.wait(timeout=60)
        pids = re.findall(r"process (\d+) spawned", Path(said.name).read_text())
        assert len(pids) == 2
        for pid in pids:
            _gone(int(pid))
    (checkpoint,) = checkpoints_of(tmp_path / "run")
    assert read_manifest(checkpoint) and "stopped after step" in (tmp_path / "said.txt").read_text()


def _gone(pid: int) -> None:
    """Waits for a process that is not a child, a minute at most."""
    import select

    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([ended], [], [], 60)[0], f"process {pid} is still there"


# ---------------------------------------------------------------------- out of disk
@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_a_full_disk_leaves_the_earlier_checkpoints(flags, tmp_path):
    """No file may grow beyond 50 KB from the fourth step on, as on a disk that is full."""
    script = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/helpers']\n"
        "import resource, torch, main_train\nfrom utils.runtime.command import run_command\n"
        "step, count = torch.optim.AdamW.step, [0]\n"
        "def limited(*args, **kwargs):\n"
        "    count[0] += 1\n"
        "    if count[0] == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "    return step(*args, **kwargs)\n"
        "torch.optim.AdamW.step = limited\n"
        "run_command(lambda: main_train.main(sys.argv[2:]))\n"
    )
    words = [sys.executable, "-c", script, str(ROOT), *flags, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "the checkpoint of step 4 cannot be written" in done.stderr and "GB are free" in done.stderr
    (left,) = checkpoints_of(tmp_path / "run")
    assert left.name == "checkpoint-2" and read_manifest(left)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_disk_that_is_full_for_one_of_two_processes(flags, tmp_path, rank):
    """Each writes its own shard: one message, no torso, the earlier checkpoint whole, and none waits for the other."""
    script = tmp_path / "full.py"
    script.write_text(
        f"import os, resource, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport main_train\n"
        "from utils.runtime.command import run_command\nfrom utils.train.trainer import FaultTolerantTrainerMixin\n"
        "save = FaultTolerantTrainerMixin._save_checkpoint\n"
        "def limited(self, *args):\n"
        f"    if os.environ['RANK'] == {rank!r} and self.state.global_step == 4:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "    save(self, *args)\n"
        "FaultTolerantTrainerMixin._save_checkpoint = limited\n"
        "sys.argv = [w for w in sys.argv if not w.startswith('--local_rank')]\nrun_command(main_train.main)\n"
    )
    done = two_processes([str(script), *flags, "--output_dir", str(tmp_path / "run"), "--train_special_tokens", "off"])
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said, said[-3000:]
    assert said.count("the checkpoint of step 4 cannot be written") == 1 and f"process {rank}: " in said
    (left,) = checkpoints_of(tmp_path / "run")
    assert left.name == "checkpoint-2" and read_manifest(left)


def test_the_only_whole_checkpoint_is_never_rotated_away(tmp_path):
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        mark_incomplete(folder)
        (folder / "weights").write_text("x")
    mark_complete(tmp_path / "checkpoint-1", {})
    rotate_checkpoints(tmp_path, 1, None)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-1"]
    for step in (4, 5, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("x")
        mark_complete(tmp_path / f"checkpoint-{step}", {})
    rotate_checkpoints(tmp_path, 2, str(tmp_path / "checkpoint-1"))
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-1", "checkpoint-6"]
    rotate_checkpoints(tmp_path, None, None)
    assert len(checkpoints_of(tmp_path)) == 2


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    """By number: of 9, 10 and 100 the last is the newest, whatever letters say."""
    for step in (9, 100, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_a_torso_is_told_from_a_whole_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-7"
    mark_incomplete(folder)
    (folder / "weights").write_text("whole")
    assert read_manifest(folder) is None
    mark_complete(folder, {"must": {}})
    assert read_manifest(folder)["settings"] == {"must": {}}
    (folder / "weights").write_text("who")
    assert read_manifest(folder) is None
    assert remove_incomplete_checkpoints(tmp_path) == [] and folder.exists()  # it was whole once: its owner changed it
    mark_incomplete(folder)
    assert remove_incomplete_checkpoints(tmp_path) == ["checkpoint-7"] and not folder.exists()


# ---------------------------------------------------------------------- numbers that are none
@pytest.fixture
def poisoned(monkeypatch):
    """Rows on line 3 have a loss that is no number."""
    from trl import DPOTrainer, SFTTrainer

    from utils.train.trainer import FaultTolerantTrainerMixin

    training_step = FaultTolerantTrainerMixin.training_step

    def remember(self, model, inputs, *args, **kwargs):
        self.bad = 3 in [source & 0xFFFF for source in inputs["source"]]
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(FaultTolerantTrainerMixin, "training_step", remember)
    for trainer in (SFTTrainer, DPOTrainer):
        compute = trainer.compute_loss
        monkeypatch.setattr(
            trainer, "compute_loss",
            lambda self, *args, _compute=compute, **kwargs: _compute(self, *args, **kwargs) * (
                float("nan") if getattr(self, "bad", False) and self.model.training else 1.0
            ),
        )  # fmt: skip


DPO = ["--train_args_path", "train_args/dpo/base.py"]


@pytest.mark.parametrize("task", [[], DPO, ["--packing", "true", "--max_len", "64"]], ids=["sft", "dpo", "packed"])
def test_a_loss_that_is_none_stops_and_names_step_and_rows(poisoned, refused, tiny_models, tmp_path, task):
    data = write_rows(tmp_path / "rows.jsonl", tiny.PAIRS if task == DPO else tiny.ROWS)
    out = refused(
        main_train.main, *task, "--model_name_or_path", tiny_models(), "--train_data_path", data, "--report_to", "none",
        "--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "1", "--disable_tqdm", "true",
    )  # fmt: skip
    assert re.search(r"step \d+: the loss is nan; its rows are\n  \S*rows.jsonl: line [\d, ]*3\b", out)
    if not task:
        assert re.search(r"rows.jsonl: line 3$", out, re.MULTILINE)  # one row a step, so no other is named


def test_skipped_steps_leave_the_weights_and_are_counted(poisoned, train, tmp_path):
    folder = train("--on_nan", "skip", "--per_device_train_batch_size", "1", "--logging_steps", "1")
    summary = json.loads((folder / "train_args.json").read_text(encoding="utf-8"))["summary"]
    assert (summary["steps"], summary["steps_skipped"]) == (16, 2)
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert log.count("the step is skipped; its rows are") >= 2 and "rows.jsonl: line 3" in log
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert any("lora_B" in name and weight.any() for name, weight in weights.items())


def test_steps_left_out_are_counted_also_after_a_resume(poisoned, train, tmp_path):
    more = ["--on_nan", "skip", "--per_device_train_batch_size", "1", "--save_strategy", "steps", "--save_steps", "1"]
    more += ["--save_total_limit", "99", "--num_train_epochs", "2"]
    whole = train(*more)
    state = json.loads((whole / "trainer_state.json").read_text(encoding="utf-8"))
    skipped = [entry["step"] for entry in state["log_history"] if "steps_skipped" in entry]
    assert len(skipped) == 2
    checkpoint = str(whole / f"checkpoint-{skipped[0]}")
    folder = train(*more, "--resume_from_checkpoint", checkpoint, output="resumed")
    summary = json.loads((folder / "train_args.json").read_text(encoding="utf-8"))["summary"]
    assert summary["steps_skipped"] == 2


def test_a_skipped_step_moves_nothing(poisoned, train):
    """Not even by the momentum of the steps before."""
    saved = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "99"]
    folder = train("--on_nan", "skip", "--per_device_train_batch_size", "1", *saved)
    log = (folder / "train.log").read_text(encoding="utf-8")
    step = max(int(number) for number in re.findall(r"step (\d+): the loss is nan, the step is skipped", log))
    assert step > 2
    before, after, later = (
        load_file(folder / f"checkpoint-{number}" / "adapter_model.safetensors")
        for number in (step - 1, step, step - 2)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(before[name], later[name]) for name in before)


def test_it_is_not_the_rows_when_every_step_is_skipped(refused, tiny_models, rows_file, tmp_path):
    out = refused(
        main_train.main, "--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--report_to", "none",
        "--output_dir", str(tmp_path / "run"), "--on_nan", "skip", "--learning_rate", "1e30", "--warmup_steps", "0",
        "--disable_tqdm", "true",
    )  # fmt: skip
    assert "10 in a row" in out and not (tmp_path / "run" / "train_args.json").exists()


class Steps:
    """Stands for transformers' Trainer: each step has the losses and the norm that a test gives."""

    def __init__(self):
        self.args = SimpleNamespace(fp16=False, device=torch.device("cpu"), output_dir="run", save_only_model=False)
        self.state = SimpleNamespace(global_step=0, log_history=[])
        self.on_nan, self.files = "skip", ["a.jsonl"]

    def training_step(self, model, inputs, num_items_in_batch=None):
        return torch.tensor(inputs["loss"])

    def _get_grad_norm(self, model, grad_norm=None):
        self.state.global_step += 1
        return grad_norm


@pytest.fixture
def steps():
    from utils.train.trainer import FaultTolerantTrainerMixin

    trainer, model = type("Trainer", (FaultTolerantTrainerMixin, Steps), {})(), torch.nn.Linear(1, 1)

    def step(*losses, norm=1.0):
        """An update of several passes, the n-th of which has row n of the file."""
        for line, loss in enumerate(losses, 1):
            trainer.training_step(model, {"loss": loss, "source": [line]})
        trainer._get_grad_norm(model, norm)
        return trainer

    return step


def test_ten_steps_that_are_left_out_end_a_run_only_where_none_between_them_is_good(steps):
    for _ in range(3):
        for _ in range(9):
            steps(1.0, norm=math.nan)
        steps(1.0)
    assert steps(1.0).steps_skipped == 27
    for _ in range(9):
        steps(math.nan)
    with pytest.raises(UserError, match="10 in a row"):
        steps(1.0, norm=math.inf)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_of_an_update_the_rows_of_the_bad_pass_are_named(steps, loss, monkeypatch):
    """An infinite loss is one of them; with gradients that are not finite, any row of the update may be it."""
    from loguru import logger

    said = []
    sink = logger.add(said.append, format="{message}")
    trainer = steps(1.0, loss, 2.0)
    assert trainer.steps_skipped == 1 and f"the loss is {loss}, the step is skipped; its rows are" in said[-1]
    assert said[-1].strip().endswith("a.jsonl: line 2")
    steps(1.0, 1.0, norm=math.inf)
    assert "the gradients' norm is inf" in said[-1] and said[-1].strip().endswith("a.jsonl: line 1, 2")
    count = len(said)
    steps(1.0, 1.0)
    logger.remove(sink)
    assert len(said) == count and trainer.steps_skipped == 2


def test_weights_the_last_step_broke_are_not_saved(refused, tiny_models, rows_file, tmp_path):
    out = refused(
        main_train.main, "--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--report_to", "none",
        "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--learning_rate", "1e40", "--warmup_steps", "0",
        "--disable_tqdm", "true", "--save_strategy", "no",
    )  # fmt: skip
    assert "is not finite, so nothing is saved" in out
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_two_processes_name_the_bad_rows_of_either(flags, tmp_path):
    """The loss of rank 1 is no number in step 2; the message is one, and names its rows, not rank 0's."""
    script = tmp_path / "poison.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom trl import SFTTrainer\nimport main_train\n"
        "from utils.runtime.command import run_command\nfrom utils.data.places import format_sources\n"
        "from utils.train.trainer import FaultTolerantTrainerMixin\n"
        "compute, step = SFTTrainer.compute_loss, FaultTolerantTrainerMixin.training_step\n"
        "def bad(self, *args, **kwargs):\n"
        "    broken = os.environ['RANK'] == '1' and self.state.global_step == 1\n"
        "    return compute(self, *args, **kwargs) * (float('nan') if broken else 1.0)\n"
        "def seen(self, model, inputs, *args, **kwargs):\n"
        "    if os.environ['RANK'] == '1' and self.state.global_step == 1:\n"
        f"        open({str(tmp_path / 'rows.txt')!r}, 'w').write(format_sources(inputs['source'], self.files))\n"
        "    return step(self, model, inputs, *args, **kwargs)\n"
        "SFTTrainer.compute_loss, FaultTolerantTrainerMixin.training_step = bad, seen\n"
        "sys.argv = [w for w in sys.argv if not w.startswith('--local_rank')]\nrun_command(main_train.main)\n"
    )
    done = two_processes([str(script), *flags, "--output_dir", str(tmp_path / "run"), "--save_strategy", "no"])
    said = done.stdout + done.stderr
    assert done.returncode == 2 and said.count("step 2: the loss is nan") == 1, said[-3000:]
    assert f"its rows are{(tmp_path / 'rows.txt').read_text()}\n" in said


# ---------------------------------------------------------------------- resumed with the wrong things
@pytest.fixture
def begun(copied):
    return copied("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2")


def test_an_older_checkpoint_is_not_mixed_with_newer_ones(refused, train, begun, tiny_models, rows_file):
    older = str(begun / "checkpoint-1")
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--output_dir", str(begun)]
    out = refused(main_train.main, *flags, "--resume_from_checkpoint", older)
    assert "is older than checkpoint-2" in out and (begun / "checkpoint-2").exists()
    train("--resume_from_checkpoint", older, "--overwrite_output_dir", "true", "--max_steps", "2")
    assert [path.name for path in checkpoints_of(begun)] == ["checkpoint-1"]


def test_another_runs_checkpoint_does_not_open_a_finished_folder(refused, train, begun, tiny_models, rows_file):
    other = train(output="other")
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--output_dir", str(other)]
    out = refused(main_train.main, *flags, "--resume_from_checkpoint", str(begun / "checkpoint-2"))
    assert "already holds a finished run" in out


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--optim", "adafactor"], "optim"),
        (["--loraplus_lr_ratio", "16"], "loraplus_lr_ratio None, now: 16"),
        (["--lora_rank", "4"], "lora_rank 16, now: 4"),
        (["--lora_alpha", "4"], "lora_alpha 32"),
        (["--use_dora", "true"], "use_dora False, now: True"),
        (["--lora_target_modules", "q_proj"], "lora_target_modules None, now: q_proj"),
        (["--template_name", "yi"], "template_name qwen, now: yi"),
        (["--max_len", "32"], "max_len 1024, now: 32"),
        (["--train_special_tokens", "on"], "train_special_tokens auto, now: on"),
        (["--use_rslora", "true"], "use_rslora False, now: True"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(refused, begun, tiny_models, rows_file, changed, named):
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--output_dir", str(begun)]
    before = sorted(begun.rglob("*"))
    assert named in refused(main_train.main, *flags, "--resume_from_checkpoint", "true", *changed)
    assert sorted(begun.rglob("*")) == before


def test_a_seed_that_holds_other_rows_back_is_refused(refused, train, tiny_models, rows_file):
    """With it rows that were trained on would be evaluated, and the other way round."""
    run = train("--val_size", "2", "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2")
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--output_dir", str(run)]
    out = refused(main_train.main, *flags, "--resume_from_checkpoint", "true", "--val_size", "2", "--seed", "7")
    assert "the seed that held rows back 42, now: 7" in out


def test_a_checkpoint_of_another_base_or_other_rows_is_refused(refused, begun, tiny_models, rows_file, tmp_path):
    resume = ["--output_dir", str(begun), "--resume_from_checkpoint", "true"]
    other = tiny.save_tiny_model(tmp_path / "other", seed=5)
    out = refused(main_train.main, "--model_name_or_path", other, "--train_data_path", rows_file, *resume)
    assert "was made with the base model" in out and "the training rows" not in out
    rows = write_rows(tmp_path / "others.jsonl", tiny.ROWS[:5])
    out = refused(main_train.main, "--model_name_or_path", tiny_models(), "--train_data_path", rows, *resume)
    assert "was made with the training rows" in out and "the base model" not in out
    # the same rows in another file are the same rows
    copy = write_rows(tmp_path / "copy.jsonl", tiny.ROWS)
    main_train.main(
        ["--model_name_or_path", tiny_models(), "--train_data_path", copy, *resume, "--max_steps", "2",
         "--per_device_train_batch_size", "4", "--report_to", "none", "--disable_tqdm", "true"]
    )  # fmt: skip


def test_a_run_from_an_adapter_is_not_resumed_without_it(refused, train, begun, tiny_models, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)
    run = train(*DPO, "--adapter_name_or_path", str(begun), "--save_strategy", "epoch", data=data, output="dpo")
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", data, "--output_dir", str(run)]
    out = refused(main_train.main, *DPO, *flags, "--resume_from_checkpoint", "true")
    assert "the adapter to start from" in out


def test_what_changes_the_steps_to_come_is_warned_of(train, begun, tiny_models):
    flags = ["--resume_from_checkpoint", "true", "--max_steps", "3", "--max_grad_norm", "7", "--adam_beta2", "0.5"]
    folder = train(*flags)
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "resuming with max_grad_norm 7.0, it was 1.0" in log and "resuming with max_steps 3, it was 2" in log
    assert "resuming with adam_beta2 0.5, it was 0.999" in log
    assert log.count("resuming with") == 3  # and what is the same is not warned of


def test_an_order_that_is_drawn_anew_is_warned_of(train):
    flags = ["--save_strategy", "steps", "--save_steps", "1", "--train_sampling_strategy", "group_by_length"]
    train(*flags, "--max_steps", "2")
    flags += ["--resume_from_checkpoint", "true", "--max_steps", "3"]
    assert "which draws a new order of rows" in (train(*flags) / "train.log").read_text(encoding="utf-8")


def test_a_finished_run_that_is_resumed_trains_no_step_more(train):
    flags = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3"]  # in the middle of an epoch
    before = load_file(train(*flags) / "adapter_model.safetensors")
    folder = train(*flags, "--resume_from_checkpoint", "true")
    after = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 3  # the schedule ends at zero, so the weights alone would not tell
