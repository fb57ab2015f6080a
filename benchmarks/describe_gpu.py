"""What a Python has and what its GPU is, as JSON: python -m benchmarks.describe_gpu

In a process of its own: one that asks the card keeps some of its memory.
"""

import importlib.metadata
import json
import shutil
import subprocess
from importlib.util import find_spec

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "flash-attn", "liger-kernel", "triton")


def card() -> dict:
    """Name, memory in GB (1e9 bytes), driver and CUDA of the first GPU; of a CPU its name alone."""
    import torch

    if not torch.cuda.is_available():
        return {"name": "CPU", "memory_gb": None, "driver": None, "cuda": None}
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    drivers = subprocess.run(ask, capture_output=True, text=True).stdout.split() if shutil.which(ask[0]) else []
    return {
        "name": torch.cuda.get_device_name(0),
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
        "driver": drivers[0] if drivers else None,
        "cuda": torch.version.cuda,
    }


def describe() -> dict:
    """The card, the versions of what is installed, and which faster kernels can be used."""
    from transformers.utils import is_flash_attn_2_available

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = card()
    return {
        "card": found,
        "versions": versions,
        "flash_attention": bool(is_flash_attn_2_available()),
        "liger": found["name"] != "CPU" and find_spec("liger_kernel") is not None,
    }


if __name__ == "__main__":
    print(json.dumps(describe()))
