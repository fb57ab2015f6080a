"""What a run notes of itself: arguments, data files, base, versions and hardware. Read again by --config and others."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path

from utils.config.deepspeed import short_name
from utils.runtime.distributed import started_by_deepspeed, uses_fsdp, world_size
from utils.storage.weights import fingerprint

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "deepspeed")
_SECRET = re.compile(r"(?<!s)token(?!s)|api_?key|secret|passw|credential")


def effective_args(args, train_args) -> dict:
    """Every value the run uses, by dataclass; no token, nothing from the environment."""
    parts = {"common": dataclasses.asdict(args), "trainer": train_args.to_dict()}
    told = {
        part: {name: value for name, value in values.items() if not _SECRET.search(name)}
        for part, values in parts.items()
    }
    told["trainer"]["deepspeed"] = short_name(told["trainer"].get("deepspeed"))  # found again wherever the project lies
    return told | {"versions": versions()}


def versions() -> dict[str, str]:
    """The libraries' versions."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def run_record(args, train_args, data) -> dict:
    """What a run notes before it trains; its data files may change while it does.

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument.
        data: the prepared rows.
    """
    # an adapter fits these weights and no others of their shape
    base = {"path": args.model_name_or_path, "fingerprint": fingerprint(args.model_name_or_path)}
    rows = {"train": _rows_record(data.report) | {"trained": data.rows_trained()}}
    if data.eval is not None:
        held_back = {"held_back": data.held_back}
        rows["eval"] = _rows_record(data.eval_report) if data.eval_report else held_back
    record = effective_args(args, train_args) | {"base": base, "data": rows}
    if args.adapter_name_or_path:
        record["adapter"] = {"path": args.adapter_name_or_path, "fingerprint": fingerprint(args.adapter_name_or_path)}
    return record | {"hardware": hardware(), "start": launcher()}


def _rows_record(report) -> dict:
    files = [{"file": file, "bytes": report.bytes_of[file], "sha256": report.hashes[file]} for file in report.files]
    names = ("rows", "kept", "dropped", "shortened", "untrained", "tokens", "trained_tokens")
    return {"files": files, **{name: getattr(report, name) for name in names}}


def sha256_of(file: str) -> str:
    """A file's hash, as `sha256sum` says it."""
    return checksum(file)[0]


def checksum(file: str) -> tuple[str, int]:
    """A file's sha256, and of how many bytes it is."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest(), content.tell()


def launcher() -> dict:
    """How many processes there are, and the words before `main_train.py` that start as many.

    `{"processes": 2, "command": "torchrun --nproc_per_node 2 main_train.py"}`
    """
    count = world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", count)))
    if started_by_deepspeed():
        where = f"--num_gpus {here}" if here == count else "--hostfile hosts"
        words = f"deepspeed {where} main_train.py"
    elif uses_fsdp():
        words = f"accelerate launch --config_file train_args/accelerate_config/fsdp.yaml --num_processes {count} "
        words += "main_train.py"
    elif count > 1:
        machines = f"--nnodes {count // here} " if here != count else ""
        words = f"torchrun {machines}--nproc_per_node {here} main_train.py"
    else:
        words = "python main_train.py"
    return {"processes": count, "command": words}


def hardware() -> dict:
    """The machine: processor, cores, memory in bytes, GPUs, system, Python."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_record(record: dict, path: Path) -> None:
    """Writes the record of a run as JSON, whole or not at all."""
    temporary = path.with_name(path.name + "~")
    temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)
