"""Puts a model into a deterministic state for probing, and restores it afterwards."""

import contextlib
from collections.abc import Iterator

WINDOW = 4  # attention windows while probing, in tokens, so that short rows are longer than them
# names, in configurations and modules, of the number of tokens that one token attends to or selects
_SPANS = (
    "sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size", "local_attention",
    "index_topk", "index_topk_blocks", "keep_window_size",
)  # fmt: skip
# names, in modules, of the rates of random operations in training mode
_RATES = (
    "attention_dropout", "dropout", "activation_dropout", "jitter_noise", "router_jitter_noise", "input_jitter_noise",
    "moe_jitter_eps",
)  # fmt: skip
FLOAT32_UP_TO = 500_000_000  # weights; larger models are probed in the precision they were loaded in


def is_whole(model) -> bool:
    """Whether this process has every weight completely, which ZeRO-3 and FSDP shard."""
    return all(weight.numel() and weight.device.type != "meta" for weight in model.parameters())


@contextlib.contextmanager
def as_for_probing(model) -> Iterator[bool]:
    """Sets training mode without dropout and jitter, in float32 if the model is small; restores everything at the end.

    Yields:
        whether the model computes in float32.
    """
    import torch

    was_training = model.training
    weights = {weight: weight.data for weight in model.parameters()}
    buffers = {buffer: buffer.data for buffer in model.buffers()}
    floating = all(weight.is_floating_point() and weight.dtype.itemsize >= 2 for weight in weights)
    precise = floating and sum(weight.numel() for weight in weights) <= FLOAT32_UP_TO
    rates: list = []
    try:
        for tensor, data in buffers.items():  # a forward pass may write to them
            tensor.data = data.to(torch.float32 if precise and data.is_floating_point() else data.dtype, copy=True)
        if precise:
            for weight in weights:
                weight.data = weight.data.float()
        else:
            _round_saved_modules(model)
        rates = leave_dropout_out(model)
        model.train()
        yield precise
    finally:
        for tensor, data in {**weights, **buffers}.items():
            tensor.data = data
        for module, name, rate in rates:
            setattr(module, name, rate)
        model.train(was_training)


def _round_saved_modules(model) -> None:
    """Casts PEFT's copies of modules, trained in float32, to the originals' dtype: only autocast mixes the two."""
    for module in model.modules():
        copies = getattr(module, "modules_to_save", None)  # of peft.utils.other.ModulesToSaveWrapper
        for copy in copies.values() if hasattr(copies, "values") else ():
            for weight, original in zip(copy.parameters(), module.original_module.parameters(), strict=True):
                weight.data = weight.data.to(original.dtype)


def leave_dropout_out(model) -> list[tuple]:
    """Sets dropout and router jitter to 0, which would draw different random numbers for different batches.

    Returns:
        (module, name of its attribute, its rate before), to restore them.
    """
    import torch

    rates = [(module, "p", module.p) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for module in model.modules():
        for name in _RATES:
            if isinstance(getattr(module, name, None), float):
                rates.append((module, name, getattr(module, name)))
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    return rates


def random_states(device) -> list[list[int]]:
    """The states of the random number generators of the CPU and of the model's device."""
    import torch

    states = [torch.random.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return [state.tolist() for state in states]


@contextlib.contextmanager
def short_spans(model) -> Iterator[int | None]:
    """Shortens sliding windows, attention chunks and sparse attention, so that short rows are longer than them.

    Yields:
        the smallest of their original sizes, in tokens; None if the model has none.
    """
    configs = [model.config, *(part for part in vars(model.config).values() if hasattr(part, "to_dict"))]
    before = []
    for owner in [*configs, *model.modules()]:
        for name in _SPANS:
            size = vars(owner).get(name)
            if isinstance(size, int) and not isinstance(size, bool) and size > WINDOW:
                before.append((owner, name, size))
    try:
        for owner, name, _ in before:
            setattr(owner, name, WINDOW)
        yield min((size for _, _, size in before), default=None)
    finally:
        for owner, name, size in before:
            setattr(owner, name, size)
