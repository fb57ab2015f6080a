"""Computes the bytes of weights, gradients and optimizer states on one GPU, without DeepSpeed and for each ZeRO stage.

The formulas follow what DeepSpeed 0.19 allocates in stage_1_and_2.py, stage3.py and unfused_optimizer.py; a test
compares them with real runs on two processes.
"""

import math
from dataclasses import dataclass, field

from utils.memory.layout import (
    Layout,
    each_size,
    muon_states,
    optim_name,
    optimizer_groups,
    optimizer_states,
    sizes_of,
    weights_of,
)


@dataclass(frozen=True)
class States:
    """Bytes on one GPU, and in the CPU memory of its process.

    Attributes:
        parameters, gradients, optimizer: on the GPU. Gradients at the end of the backward pass; with ZeRO-2 and -3 the
            shard that the process keeps for its step.
        host_parameters, host_gradients, host_optimizer, host_buffers: in CPU memory.
        buffers: DeepSpeed's and DDP's, in the backward pass.
        step: temporary memory of the optimizer's step, when activations and buffers are freed.
        words: name of a part → how it was computed, as text.
    """

    parameters: int
    gradients: int
    optimizer: int
    host_parameters: int = 0
    host_gradients: int = 0
    host_optimizer: int = 0
    host_buffers: int = 0
    buffers: int = 0
    step: int = 0
    words: dict = field(default_factory=dict, compare=False)

    @property
    def host(self) -> int:
        return self.host_parameters + self.host_gradients + self.host_optimizer + self.host_buffers


def model_states(args, train_args, model, layout: Layout, compute_size: int) -> States:
    """Computes the states on the GPU that holds most.

    Args:
        args, train_args: as parsed.
        model: from `meta_model`.
        layout: how it is sharded.
        compute_size: bytes of a number in the dtype of the computation.
    """
    weights = weights_of(model, layout, compute_size)
    groups = optimizer_groups(args, train_args, model)
    if not layout.laid_out:
        trained = [weight for group in groups for weight in group]
        states = muon_states(args, train_args, model) if args.use_muon else optimizer_states(train_args, trained)
        return _plain(train_args, weights, trained, states, layout)
    hidden = model.config.get_text_config().hidden_size
    make = {0: _zero0, 1: _zero12, 2: _zero12, 3: _zero3}[layout.stage]
    return make(train_args, weights, groups, layout, compute_size, hidden)


def _meta(numel: int):
    import torch

    return torch.empty(numel, dtype=torch.float32, device="meta")


def _plain(train_args, weights, trained: list, moments: int, layout) -> States:
    gradients = sum(weight.numel() * weight.element_size() for weight in trained)
    return States(
        parameters=sum(weight.bytes for weight in weights),
        gradients=gradients,
        optimizer=moments,
        # DDP reduces gradients in buckets, which are a second copy of all of them
        buffers=gradients if layout.processes > 1 else 0,
        words={
            "parameters": sizes_of(weights),
            "gradients": each_size(trained),
            "optimizer": f"what {optim_name(train_args)} keeps of {sum(w.numel() for w in trained):,} trained weights",
            "buffers": "DDP's buckets: a second copy of the gradients" if layout.processes > 1 else "",
        },
    )


def _zero0(train_args, weights, groups, layout, compute_size, hidden) -> States:
    """DeepSpeed without sharding; below float32 each trained weight also has a float32 copy, which Adam updates."""
    if compute_size == 4:
        return _plain(train_args, weights, groups, layout)
    numels = [weight.numel() for group in groups for weight in group]
    optimizer = 4 * sum(numels) + optimizer_states(train_args, [_meta(numel) for numel in numels])
    return States(
        parameters=sum(weight.bytes for weight in weights),
        gradients=compute_size * sum(numels),
        optimizer=optimizer,
        step=4 * sum(numels),
        words={
            "parameters": sizes_of(weights),
            "gradients": f"{sum(numels):,} × {compute_size} B",
            "optimizer": f"{sum(numels):,} × (4 B float32 copy + what {optim_name(train_args)} keeps)",
        },
    )


def _overlapping(group: list, partition: int, rank: int) -> int:
    """The size of the weights that overlap a process's partition, each in full, and of the padding at its end."""
    start, end = rank * partition, (rank + 1) * partition
    place, total, reached = 0, 0, start
    for weight in group:
        if place < end and place + weight.numel() > start:
            total += weight.numel()
            reached = min(end, place + weight.numel())
        place += weight.numel()
    return total + (end - max(reached, start))


def _zero12(train_args, weights, groups, layout, compute_size, hidden) -> States:
    """ZeRO-1 and -2: flattened groups of trained weights, padded to 2 × GPUs and sharded evenly; Adam in float32."""
    gpus, stage, offload = layout.processes, layout.stage, layout.offloads("optimizer")
    numels = [sum(weight.numel() for weight in group) for group in groups]
    flat = [math.ceil(numel / (2 * gpus)) * 2 * gpus for numel in numels]
    parts = [numel // gpus for numel in flat]
    padding = compute_size * (sum(flat) - sum(numels))
    optimizer = 4 * sum(parts) + optimizer_states(train_args, [_meta(part) for part in parts])
    kept = compute_size * max(
        sum(_overlapping(group, part, rank) for group, part in zip(groups, parts, strict=True)) for rank in range(gpus)
    )
    gradients = kept if stage == 2 else compute_size * sum(numels)
    bucket = layout.figure("reduce_bucket_size", 5e8, hidden**2)
    buckets = compute_size * bucket * (2 if layout.config.get("overlap_comm") else 1)
    largest = compute_size * max(weight.numel() for group in groups for weight in group)
    # ZeRO-1 copies its shard from the full gradients; with accumulation ZeRO-2 has the accumulated and the new shard
    copied = kept if stage == 1 or train_args.gradient_accumulation_steps > 1 else 0
    words = {
        "parameters": sizes_of(weights) + (f" + {padding} B of padding" if padding else ""),
        "gradients": f"{gradients // compute_size:,} × {compute_size} B"
        + (f", of the weights that overlap one of {gpus} shards" if stage == 2 else ""),
        "optimizer": f"{sum(numels):,} / {gpus} × (4 B float32 copy + what {optim_name(train_args)} keeps)",
        "buffers": f"{buckets // bucket // compute_size} buckets of {bucket:,} gradients × {compute_size} B "
        "(reduce_bucket_size)",
    }
    common = {"parameters": sum(weight.bytes for weight in weights) + padding, "words": words}
    if not offload:
        return States(gradients=gradients, optimizer=optimizer, buffers=buckets + copied, step=4 * max(parts), **common)
    return States(
        gradients=0,
        optimizer=0,
        host_gradients=4 * sum(parts),
        host_optimizer=optimizer,
        host_buffers=compute_size * sum(parts) + largest,  # updated weights to copy back, and the largest gradient
        buffers=buckets + kept + largest,
        **{**common, "words": {**words, "gradients": "in CPU memory", "optimizer": "in CPU memory"}},
    )


def _zero3(train_args, weights, groups, layout, compute_size, hidden) -> States:
    """ZeRO-3: each weight is sharded separately; small ones are also kept in full."""
    gpus = layout.processes

    def part(numel: int) -> int:
        return math.ceil(numel / gpus)

    small = layout.figure("stage3_param_persistence_threshold", 1e5, 10 * hidden)
    split = sum(int(part(weight.numel) * weight.size) for weight in weights)
    persistent = sum(int(weight.numel * weight.size) for weight in weights if weight.numel <= small)
    scales = sum(weight.scales for weight in weights)
    parts = _sub_groups(groups, part, layout.figure("sub_group_size", 1e9, int(1e9)))
    trained = sum(parts)
    # also if the weights are float32 already: DeepSpeed compares the device with its name, so it always copies
    optimizer = 4 * trained + optimizer_states(train_args, [_meta(numel) for numel in parts])
    gradients = compute_size * trained
    bucket = layout.figure("reduce_bucket_size", 5e8, hidden**2)
    total = sum(weight.numel for weight in weights)
    live = min(total, layout.figure("stage3_max_live_parameters", 1e9, int(1e9)))
    gathered = int(live / total * sum(weight.numel * weight.size for weight in weights))
    offload_param, offload = layout.offloads("param"), layout.offloads("optimizer")
    words = {
        "parameters": f"{total:,} / {gpus} of {sizes_of(weights)}, and {persistent:,} B of small ones in full",
        "gradients": f"{trained:,} × {compute_size} B",
        "optimizer": f"{trained:,} × (4 B float32 copy + what {optim_name(train_args)} keeps)",
        "buffers": f"up to {live:,} gathered weights (stage3_max_live_parameters), a bucket of {bucket:,} gradients",
    }
    kept = sum(int(part(weight.numel) * weight.size) for weight in weights if weight.numel <= small)
    return States(
        parameters=(kept if offload_param else split) + persistent + scales,
        gradients=0 if offload else gradients,
        optimizer=0 if offload else optimizer,
        host_parameters=split - kept if offload_param else 0,
        host_gradients=gradients + 4 * trained if offload else 0,
        host_optimizer=optimizer if offload else 0,
        buffers=gathered + compute_size * bucket,
        step=0 if offload else 4 * max(parts),
        words=words,
    )


def _sub_groups(groups: list[list], part, limit: int) -> list[int]:
    """The sizes of ZeRO-3's sub-groups, which it updates one at a time: weights in turn until `limit` is reached."""
    sizes = []
    for group in groups:
        numels, size = [part(weight.numel()) for weight in group], 0
        if sum(numels) <= limit:
            sizes.append(sum(numels))
            continue
        for index, numel in enumerate(numels):
            size += numel
            if size >= limit or index == len(numels) - 1:
                sizes.append(size)
                size = 0
    return sizes
