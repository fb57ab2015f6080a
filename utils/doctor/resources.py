"""Findings about disk and memory: checkpoints, the training's peak, and weights that QLoRA leaves in 16 bits."""

import math
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from loguru import logger

from utils.doctor.codes import ERROR, WARNING
from utils.doctor.findings import Finding
from utils.memory.layout import quantised_bytes
from utils.model.meta import ModelSize, is_quantised, meta_base, model_size_or_none
from utils.runtime.errors import UserError
from utils.runtime.text import format_size
from utils.storage.files import existing_parent
from utils.storage.run_folder import checkpoints_of

_SHARE = 0.01  # of the weights from which it is reported; a mixture's experts are nine tenths

_TIGHT_SHARE = 0.9  # of the disk or memory from which it is reported


# ------------------------------------------------------------------ disk


def checkpoint_bytes(args, train_args, model: ModelSize) -> tuple[int, int]:
    """Returns the bytes of a checkpoint and of the finished run.

    What is trained is kept in float32, beside AdamW's two numbers for each weight. DeepSpeed saves the weights in the
    arithmetic's precision twice, for itself and for others, and a float32 copy with the optimizer's numbers.
    """
    trained = model.trained
    deepspeed = train_args.deepspeed_plugin is not None
    width = 2 if deepspeed and args.precision != "fp32" else 4
    optimizer = str(getattr(train_args.optim, "value", train_args.optim))
    states = 0 if "sgd" in optimizer else 2 if "8bit" in optimizer else 8
    states += width + 4 if deepspeed else 0
    return (width + (0 if train_args.save_only_model else states)) * trained, width * trained


def disk_findings(args, train_args, steps: int) -> list[Finding]:
    """Checks that the checkpoints will fit on the disk.

    Args:
        args, train_args: of the run.
        steps: how many the training takes.
    """
    model = model_size_or_none(args)
    if model is None:
        return []
    size, finished = checkpoint_bytes(args, train_args, model)
    count = _checkpoints_on_disk(train_args, steps)
    needed = count * size + finished
    free = shutil.disk_usage(existing_parent(Path(train_args.output_dir))).free
    if needed <= _TIGHT_SHARE * free:
        return []
    message = (
        f"{count} checkpoints of {format_size(size)} each and the finished run's {format_size(finished)} take "
        f"{format_size(needed)}, and {str(train_args.output_dir)!r} has {format_size(free)} free"
    )
    return [Finding("DISK_TOO_SMALL", message, severity=ERROR if needed > free else WARNING)]


def _checkpoints_on_disk(train_args, steps: int) -> int:
    """Returns how many new checkpoints are on the disk at once; one is written before the oldest is removed."""
    strategy = getattr(train_args.save_strategy, "value", train_args.save_strategy)
    if strategy == "no":
        return 0
    if strategy == "epoch":
        saves = math.ceil(train_args.num_train_epochs)
    else:
        every = train_args.save_steps if train_args.save_steps >= 1 else math.ceil(train_args.save_steps * steps)
        saves = math.ceil(steps / max(1, every))
    if train_args.save_total_limit:
        kept = train_args.save_total_limit + bool(train_args.load_best_model_at_end)
        saves = min(saves, kept + 1)
    there = len(checkpoints_of(Path(train_args.output_dir))) if train_args.resume_from_checkpoint else 0
    return max(1, saves - there)


# ------------------------------------------------------------------ memory


def memory_findings(args, train_args, processes: int) -> list[Finding]:
    """Checks that the training fits into the memory of each process's device, and of the machine."""
    estimate = try_estimate(args, train_args, processes)
    if estimate is None:
        return []
    gpu, machine = memory_capacities(processes)
    here = min(processes, gpu.count) if gpu.count else processes
    findings = []
    for needed, place in ((estimate.total, gpu), (estimate.host * here, machine)):
        if needed > _TIGHT_SHARE * place.bytes:
            message = f"about {format_size(needed)} are needed, and {place.name} has {format_size(place.bytes)}"
            severity = ERROR if needed > place.bytes else WARNING
            findings.append(Finding("MEMORY_TOO_SMALL", message, severity=severity))
    return findings


class Memory(NamedTuple):
    """A memory to train in: its bytes, its name, and how many GPUs have one; 0 for the machine's own."""

    bytes: int
    name: str
    count: int = 0


def try_estimate(args, train_args, processes: int):
    """Estimates the memory; None, with a line in the log, if that fails, since no training should stop for it."""
    from utils.memory import estimate

    try:
        return estimate(args, train_args, processes)
    except Exception as error:  # it runs the model's own code, which raises whatever it likes
        what = str(error.problems[0]) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        logger.info("the memory that the training takes is not estimated: {}", what.partition("\n")[0][:300])
        return None


def memory_capacities(processes: int) -> tuple[Memory, Memory]:
    """Returns the memory of each process's device and the machine's; without a GPU, processes share the latter."""
    import psutil
    import torch

    machine = Memory(psutil.virtual_memory().total, "the machine")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Memory(properties.total_memory, properties.name, torch.cuda.device_count()), machine
    name = machine.name if processes == 1 else f"each of {processes} processes"
    return Memory(machine.bytes // processes, name), machine


def quantised_findings(args, train_args) -> list[Finding]:
    """Finds weights that are in no linear layer, such as a mixture's experts, which bitsandbytes does not quantise.

    Embeddings, the head, norms and biases are in 16 bits in every QLoRA, and are not named.

    Args:
        args, train_args: of a run whose base is quantised.
    """
    model = meta_base(args, train_args)
    whole = (model.get_input_embeddings(), model.get_output_embeddings())
    usual = {id(weight) for layer in whole if layer is not None for weight in layer.parameters()}
    total, packed, left = 0, 0, {}
    for name, weight in model.named_parameters():
        total += weight.numel()
        if is_quantised(weight):
            packed += quantised_bytes(weight.numel()).bytes
        elif weight.ndim > 1 and id(weight) not in usual:
            left[name] = weight
    count = sum(weight.numel() for weight in left.values())
    if count <= _SHARE * total:
        return []
    largest = sorted(left, key=lambda name: -left[name].numel())
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in largest))
    held = sum(weight.numel() * weight.element_size() for weight in left.values())
    message = (
        f"{count:,} of {total:,} weights are in no linear layer and stay in {_bits(left.values())} bits, "
        f"{format_size(held)}: {', '.join(kinds[:3])}; what is in 4 bits takes {format_size(packed)}"
    )
    return [Finding("QLORA_LEAVES_WEIGHTS", message)]


def _bits(weights) -> str:
    return " and ".join(str(bits) for bits in sorted({8 * weight.element_size() for weight in weights}))
