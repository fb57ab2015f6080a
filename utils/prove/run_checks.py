"""Proofs that compare whole runs of main_train.py, started as processes: a resumed run, and a run on two ranks."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections import deque
from pathlib import Path

from utils.model.rope import load_scaled_config
from utils.prove.figures import GRADIENT_TOLERANCE, LOSS_TOLERANCE, DoesNotApply, Measure, ProofFailed, relative, worst
from utils.prove.subject import Subject
from utils.runtime.errors import ERROR_FILE, read_problems
from utils.storage.files import ROOT
from utils.storage.run_folder import STATE, checkpoints_of
from utils.storage.weights import weights_size

STEPS, SAVE_STEP = 6, 3  # optimizer steps of a run, and the one after which it saves a checkpoint
# the rate rises over all steps: Adam's first updates depend on the signs of gradients, which rounding flips near 0
WARMUP = STEPS
RESUMED_TOLERANCE = 0.0  # a CPU adds up in the same order
RESUMED_GPU_TOLERANCE = 1e-4  # GPU kernels have no fixed order of summation
_ON_CPU_AT_MOST = 4e9  # bytes of float32 weights that a CPU trains in minutes


def resumed(subject: Subject) -> list[Measure]:
    """Compares a run resumed from the checkpoint of step 3 with an uninterrupted one."""
    _require_disk_space(subject)
    dropout = ["--lora_dropout", str(subject.dropout)]
    whole = baseline_run(subject, dropout)
    checkpoint = next((path for path in checkpoints_of(whole) if path.name == f"checkpoint-{SAVE_STEP}"), None)
    if checkpoint is None:
        raise ProofFailed(f"it left no checkpoint of step {SAVE_STEP}")
    again = run_training(subject, "resumed", [*dropout, "--resume_from_checkpoint", str(checkpoint)])
    tolerance = RESUMED_GPU_TOLERANCE if _visible_gpus() else RESUMED_TOLERANCE
    return [
        *_same_history("loss", whole, again, tolerance, first=SAVE_STEP + 1),
        _same_weights(whole, again, tolerance),
    ]


def ranks(subject: Subject) -> list[Measure]:
    """Compares a run of two processes with a run of one, on the same rows in each step."""
    import torch

    if not torch.distributed.is_available() or not (torch.distributed.is_gloo_available() or len(_visible_gpus()) > 1):
        raise DoesNotApply("this PyTorch has no torch.distributed with gloo, the backend for processes on a CPU")
    if getattr(subject.train_args, "use_liger_kernel", False) and not _visible_gpus():
        raise DoesNotApply("--use_liger_kernel true needs a GPU for each process")
    config = _config_of(subject)
    if dropout := _model_dropout(config):
        raise DoesNotApply(f"the model's config.json sets {dropout}, and each process draws its own random numbers")
    if getattr(config, "output_router_logits", False):
        raise DoesNotApply("the model's config.json sets output_router_logits: experts are balanced within a process")
    cpu = len(_visible_gpus()) == 1
    if cpu and weights_size(subject.args.model_name_or_path, "float32") > _ON_CPU_AT_MOST:
        raise DoesNotApply("there is one GPU, and the model is too large to train on the CPU in minutes")
    _require_disk_space(subject)
    none = ["--lora_dropout", "0.0"]
    whole = baseline_run(subject, none, cpu)
    two = run_training(subject, "ranks", [*none, "--save_strategy", "no"], processes=2, cpu=cpu)
    return [
        *_same_history("loss", whole, two, LOSS_TOLERANCE),
        *_same_history("grad_norm", whole, two, GRADIENT_TOLERANCE),
    ]


def baseline_run(subject: Subject, flags: list[str], cpu: bool = False) -> Path:
    """Returns the folder of the single-process run to compare with, trained once per dropout and device."""
    name = f"undisturbed-{flags[-1]}{'-cpu' if cpu else ''}"
    folder = subject.scratch / name
    return folder if (folder / STATE).is_file() else run_training(subject, name, flags, cpu=cpu)


def run_training(subject: Subject, name: str, more: list[str], processes: int = 1, cpu: bool = False) -> Path:
    """Runs main_train.py with the user's flags on the chosen rows, two per step; returns the run's folder.

    Args:
        subject: gives flags, rows and the folder for scratch files.
        name: of the run's folder.
        more: further flags.
        processes: 1 or 2.
        cpu: whether to hide the GPUs.

    Raises:
        ProofFailed: the run failed; with its problems or the last error it printed.
    """
    from tqdm import tqdm

    subject.release()
    folder = subject.scratch / name
    flags = [*_training_flags(subject, folder, processes), *more]
    launcher = [sys.executable, str(ROOT / "main_train.py")]
    if processes > 1:
        launcher[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_addr",
                         "127.0.0.1", "--master_port", _free_port()]  # fmt: skip
    tail: deque[str] = deque(maxlen=200)
    errors = subject.scratch / f"{name}-problems.json"
    errors.unlink(missing_ok=True)
    with tqdm(total=STEPS, desc=f"run: {name}", leave=False) as bar:
        environment = {**_environment(processes, cpu), ERROR_FILE: str(errors)}
        code = _run_command([*launcher, *flags], environment, tail, bar)
    if code:
        error = read_problems(errors)
        reason = _in_one_line(str(error)) if error else _error_in(list(tail))
        raise ProofFailed(f"the run {name!r} ended with exit code {code}: {reason}")
    return folder


def _training_flags(subject: Subject, folder: Path, processes: int) -> list[str]:
    # with an odd number of rows, the last step of two ranks would be padded with an empty one
    rows = len(subject.rows) // 2 * 2
    return [
        *subject.flags, "--train_data_path", subject.rows_file(rows), "--cache_dir", str(subject.scratch / "cache"),
        "--output_dir", str(folder), "--max_steps", str(STEPS), "--per_device_train_batch_size", str(2 // processes),
        "--gradient_accumulation_steps", "1", "--logging_strategy", "steps", "--logging_steps", "1",
        "--save_strategy", "steps", "--save_steps", str(SAVE_STEP), "--save_total_limit", "0",
        "--save_only_model", "false", "--warmup_steps", str(WARMUP), "--disable_tqdm", "true",
    ]  # fmt: skip


def _run_command(command: list[str], environment: dict, tail: deque, bar) -> int:
    """Runs a command with a progress bar; if this process is interrupted, the command and its children are killed."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    ) as process:  # fmt: skip
        try:
            for line in process.stdout:
                tail.append(line.rstrip())
                if "'loss'" in line:  # printed by transformers' PrinterCallback at each step
                    bar.update()
            return process.wait()
        except BaseException:
            kill_tree(process.pid)
            raise


def kill_tree(pid: int) -> None:
    """Kills a process and its descendants; the workers of a launcher are in sessions of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for process in [first, *first.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _in_one_line(text: str) -> str:
    """Joins the first lines of a message into one."""
    return " ".join(line.strip() for line in text.splitlines()[:6])


def _error_in(lines: list[str]) -> str:
    """Finds the error message in the output of a crashed run.

    Python ends a traceback with the error's name; torch.distributed.run prints one of its own after that.
    """
    errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return (errors or [line for line in lines if line.strip()] or ["it printed nothing"])[-1].strip()


def _environment(processes: int, cpu: bool) -> dict:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    gpus = [] if cpu else _visible_gpus()
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[:processes])
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
        threads = environment.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 2) // 2))
        environment["OMP_NUM_THREADS"] = threads
    return environment


def _visible_gpus() -> list[str]:
    """Returns the GPUs this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _require_disk_space(subject: Subject) -> None:
    """Raises `DoesNotApply` if the runs' checkpoints, with two moments for each trained weight, do not fit the disk."""
    base = weights_size(subject.args.model_name_or_path, "float32")
    needed = base * 11 if not subject.has_adapter else base // 5
    free = shutil.disk_usage(subject.scratch).free
    if needed > free:
        raise DoesNotApply(
            f"the runs need about {needed / 1e9:.0f} GB in {str(subject.scratch.parent)!r}, which has {free / 1e9:.0f} "
            "GB free; set TMPDIR to a folder on another disk"
        )


def _config_of(subject: Subject):
    path, code = subject.args.model_name_or_path, subject.args.trust_remote_code
    return load_scaled_config(path, subject.args.rope_scaling, code).get_text_config()


def _model_dropout(config) -> str | None:
    """Returns the first dropout that the model's configuration sets: `"attention_dropout 0.1"`; None without any."""
    names = [name for name in config.to_dict() if "dropout" in name or name.endswith("pdrop")]
    return next((f"{name} {getattr(config, name)}" for name in names if getattr(config, name)), None)


def _history(folder: Path) -> list[dict]:
    return json.loads((folder / STATE).read_text(encoding="utf-8"))["log_history"]


def _same_history(figure: str, expected: Path, found: Path, tolerance: float, first: int = 1) -> list[Measure]:
    """Compares a logged value of two runs and returns the step that differs most; empty if no step logged it."""
    theirs, ours = (
        {entry["step"]: entry[figure] for entry in _history(folder) if figure in entry and entry["step"] >= first}
        for folder in (expected, found)
    )
    if theirs.keys() != ours.keys():
        raise ProofFailed(f"the one run logged the {figure} of the steps {sorted(theirs)}, the other {sorted(ours)}")
    titles = {"grad_norm": "norm of all gradients"}
    each = [
        relative(f"{titles.get(figure, figure)} of step {step}", theirs[step], ours[step], tolerance) for step in ours
    ]
    return [worst(each)] if each else []


def _same_weights(expected: Path, found: Path, tolerance: float) -> Measure:
    """Compares the saved weights: the norm of their difference, relative to the norm of the weights."""
    from safetensors import safe_open

    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (expected, found)]
    if names[0] != names[1] or not names[0]:
        raise ProofFailed(f"the one run saved {names[0]}, the other {names[1]}")
    sizes, others, differences = 0.0, 0.0, 0.0
    for name in names[0]:
        with safe_open(expected / name, "pt") as theirs, safe_open(found / name, "pt") as ours:
            for key in theirs.keys():  # noqa: SIM118  (not a dict)
                a, b = theirs.get_tensor(key).double(), ours.get_tensor(key).double()
                sizes, others = sizes + float(a.square().sum()), others + float(b.square().sum())
                differences += float((a - b).square().sum())
    return Measure("norm of the saved weights", sizes**0.5, others**0.5, (differences / sizes) ** 0.5, tolerance)
