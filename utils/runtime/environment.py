"""Records the environment of a run: library versions, hardware, launcher."""

import functools
import importlib.metadata
import os
import platform
from pathlib import Path

from utils.runtime.distributed import started_by_deepspeed, uses_fsdp, world_size

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "deepspeed")


def versions() -> dict[str, str]:
    """Returns the versions of the main libraries."""
    return {name: _version(name) for name in LIBRARIES}


_version = functools.cache(importlib.metadata.version)  # it parses the package's metadata, several ms for each


def launcher() -> dict:
    """Returns the number of processes and a command that starts as many.

    `{"processes": 2, "command": "torchrun --nproc_per_node 2 main_train.py"}`
    """
    count = world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", count)))
    if started_by_deepspeed():
        where = f"--num_gpus {here}" if here == count else "--hostfile hosts"
        command = f"deepspeed {where} main_train.py"
    elif uses_fsdp():
        command = f"accelerate launch --config_file train_args/accelerate_config/fsdp.yaml --num_processes {count} "
        command += "main_train.py"
    elif count > 1:
        machines = f"--nnodes {count // here} " if here != count else ""
        command = f"torchrun {machines}--nproc_per_node {here} main_train.py"
    else:
        command = "python main_train.py"
    return {"processes": count, "command": command}


def hardware() -> dict:
    """Returns processor, cores, memory in bytes, GPUs, operating system and Python version."""
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
