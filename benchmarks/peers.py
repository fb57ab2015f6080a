"""The programs that are compared: how each is installed, and how each is configured to do the same work."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from utils.runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INSTALL = {
    "TRL": ["torch", "transformers", "trl", "peft", "datasets", "accelerate"],  # in this project's versions
    "LLaMA-Factory": ["torch", "llamafactory==0.9.5"],
}
# what LLaMA-Factory requires and does not use for text, and what of it has no build that fits a CPU's torch:
# torchaudio is imported, so an empty module stands in; transformers leaves torchvision out where there is none
STAND_IN, LEFT_OUT = "torchaudio", "torchvision"


@dataclass(frozen=True)
class Work:
    """What every program is to do.

    Attributes:
        base: the model's folder; its tokenizer has the chat format.
        data: a folder with the rows in each program's own form, from `write_rows`.
        rows_a_step: rows, or packed rows, of one optimizer step.
        packing: each program's best setting: packed rows of max_len, no gradient checkpointing.
        max_steps: stop there; 0 for all rows once.
    """

    base: Path
    data: Path
    rows_a_step: int = 8
    packing: bool = False
    max_steps: int = 0
    max_len: int = 1024
    seed: int = 42
    prepare_with: int | None = None  # processes


@dataclass
class Program:
    """A program and its environment; `command` makes the words of a run."""

    name: str
    python: Path
    env: dict = field(default_factory=dict)

    def command(self, work: Work, out: Path) -> list[str]:
        make = {"LLM-Dojo": _ours, "TRL": _trl, "LLaMA-Factory": _llamafactory}[self.name]
        return [str(self.python), *make(work, out)]


def programs(folder: Path, names: list[str]) -> list[Program]:
    """This project in the Python that runs this, and its peers in `folder`, installed where they are not yet."""
    offline = {"HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1"}
    return [
        Program(name, install(name, folder / name.lower()) if name in INSTALL else Path(sys.executable), offline)
        for name in names
    ]


def install(name: str, folder: Path) -> Path:
    """Makes a peer's virtual environment; returns its Python."""
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        # a name alone stands for this project's own version
        words = [one if "==" in one else _as_here(one) for one in INSTALL[name]]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if subprocess.run([str(python), "-m", "pip", "install", "-q", *words], check=False).returncode:
            raise UserError(f"{name} could not be installed into {str(folder)!r}; pip's output is above")
        if name == "LLaMA-Factory":
            _stand_in(python)
        done.touch()
    return python


def _as_here(package: str) -> str:
    return f"{package}=={importlib.metadata.version(package).partition('+')[0]}"


def _stand_in(python: Path) -> None:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", STAND_IN, LEFT_OUT], check=False)
    (packages / f"{STAND_IN}.py").write_text("")


# as qwen2.5 inserts it
_SYSTEM = ({"role": "system", "content": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},)


def write_rows(folder: Path, rows: Iterable[dict], system: tuple[dict[str, str], ...] = _SYSTEM) -> Path:
    """Writes rows for each program: as they are, as prompt and completion, and with LLaMA-Factory's index.

    Args:
        folder: is made.
        rows: in any form with messages; alpaca rows for LLaMA-Factory.
        system: what comes before the prompt for TRL.
    """
    from utils.data.conversations import to_messages

    (folder / "trl").mkdir(parents=True, exist_ok=True)
    with open(folder / "rows.jsonl", "w") as plain, open(folder / "trl" / "train.jsonl", "w") as pairs:
        for row in rows:
            turns = to_messages(row)
            print(json.dumps(row, ensure_ascii=False), file=plain)
            pair = {"prompt": [*system, *turns[:-1]], "completion": turns[-1:]}
            print(json.dumps(pair, ensure_ascii=False), file=pairs)
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}))
    return folder


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _ours(work: Work, out: Path) -> list[str]:
    return [
        "main_train.py", "--model_name_or_path", str(work.base), "--train_data_path", str(work.data / "rows.jsonl"),
        "--template_name", "qwen2.5", "--max_len", str(work.max_len), "--lora_rank", "8", "--lora_alpha", "16",
        "--lora_dropout", "0", "--num_train_epochs", "1", "--max_steps", str(work.max_steps or -1),
        "--learning_rate", "1e-4", "--per_device_train_batch_size", str(work.rows_a_step),
        "--packing", str(work.packing).lower(), "--seed", str(work.seed),
        "--precision", "bf16", "--logging_steps", "10", "--save_strategy", "no",
        "--report_to", "none", "--output_dir", str(out), "--cache_dir", str(out.parent / "cache"),
        "--train_special_tokens", "off", "--on_bad_row", "drop",
    ]  # fmt: skip


def _trl(work: Work, out: Path) -> list[str]:
    best = ["--packing", "true", "--gradient_checkpointing", "false"] if work.packing else []
    workers = ["--dataset_num_proc", str(work.prepare_with)] if work.prepare_with else []
    return [
        "-m", "trl.scripts.sft", "--model_name_or_path", str(work.base), "--dataset_name", str(work.data / "trl"),
        "--use_peft", "--lora_r", "8", "--lora_alpha", "16", "--lora_dropout", "0",
        "--lora_target_modules", *LINEAR, "--dtype", "bfloat16",
        "--max_length", str(work.max_len), "--num_train_epochs", "1", "--max_steps", str(work.max_steps or -1),
        "--learning_rate", "1e-4", "--per_device_train_batch_size", str(work.rows_a_step), "--seed", str(work.seed),
        "--bf16", "true", "--use_cpu", str(not _has_gpu()).lower(),
        "--logging_steps", "10", "--save_strategy", "no", "--report_to", "none",
        "--output_dir", str(out), *best, *workers,
    ]  # fmt: skip


def _llamafactory(work: Work, out: Path) -> list[str]:
    settings = {
        "stage": "sft", "do_train": True, "model_name_or_path": str(work.base), "finetuning_type": "lora",
        "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0, "lora_target": "all",
        "dataset": "rows", "dataset_dir": str(work.data),
        "template": "qwen", "cutoff_len": work.max_len, "num_train_epochs": 1, "max_steps": work.max_steps or -1,
        "learning_rate": 1e-4, "per_device_train_batch_size": work.rows_a_step, "gradient_accumulation_steps": 1,
        "seed": work.seed, "bf16": True, "use_cpu": not _has_gpu(),
        "logging_steps": 10, "save_strategy": "no", "report_to": "none",
        "output_dir": str(out), "preprocessing_num_workers": work.prepare_with or 1,
    }  # fmt: skip
    if work.packing:
        settings |= {"packing": True, "neat_packing": True, "disable_gradient_checkpointing": True}
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yaml")  # JSON is YAML, and its reader of .json fails
    file.write_text(json.dumps(settings))
    return ["-m", "llamafactory.cli", "train", str(file)]


def environment(program: Program, clock: Path, cache: Path, threads: int) -> dict:
    """The variables of a run: the step clock, and caches of its own."""
    return {
        **os.environ, **program.env, "PYTHONPATH": str(ROOT / "benchmarks" / "clock"), "STEP_CLOCK": str(clock),
        "HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets"), "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip
