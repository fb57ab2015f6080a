"""Compares the logits of two models, computed in float32 whatever dtype their weights have."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from loguru import logger

from utils.runtime.errors import UserError

_ROWS, _LENGTH, _SEED = 2, 24, 0
# the largest difference allowed: root mean square over the logits' standard deviation. bfloat16 has 8 bits of mantissa
# and float16 11, so rounding the weights alone changes the logits of a deep model by about a percent
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.05}
# LOST: a merge must keep what the adapter changes, however little: the largest difference relative to that change.
# NOISE: a difference below this share of the logits' deviation may be float32's rounding in another order of summation
LOST, NOISE = 0.1, 2e-5
MOST = 0.5  # as LOST for 16-bit weights, where rounding alone may lose this much


class MergeDiffers(UserError):
    """The logits of a merged model differ from those of the base with its adapter."""


class Compared(NamedTuple):
    """Two models' logits on the same tokens.

    Attributes:
        largest: the largest |difference|.
        share: root mean square of the difference over the logits' standard deviation, of the worst row.
        moved: the largest |difference| between base with and without the adapter.
        lost: root mean square of the difference over that of what the adapter changes, over all rows.
    """

    largest: float
    share: float
    moved: float
    lost: float

    def text(self) -> str:
        """`"the largest difference of a logit is 2.1e-06, and the adapter moves them by up to 1.4"`"""
        return (
            f"the largest difference of a logit is {self.largest:.2g}, and the adapter moves them by up to "
            f"{self.moved:.2g}"
        )


def probe_ids(model, tokens: list[int] | None = None):
    """Returns rows of token ids to compare: random ones, and a row with the tokens whose rows were trained.

    Args:
        model: for the size of its vocabulary.
        tokens: ids for the start of the last row; it ends with the last ids of the vocabulary.

    Returns:
        [rows, tokens] int64
    """
    import torch

    size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(size, (_ROWS + 1, _LENGTH), generator=generator)
    chosen = torch.tensor([token for token in (tokens or []) if token < size][: _LENGTH // 2], dtype=torch.long)
    ids[-1, : len(chosen)] = chosen
    last = torch.arange(max(0, size - _LENGTH // 4), size)
    ids[-1, _LENGTH - len(last) :] = last
    return ids


def logits_in_float32(model, ids):
    """Computes logits in float32, returned on the CPU; only one module's weights at a time are in float32.

    Args:
        model: a causal language model, with or without an adapter; its weights are unchanged afterwards.
        ids: [rows, tokens] int64

    Returns:
        [rows, tokens, vocabulary] float32
    """
    import torch

    training = model.training
    with torch.inference_mode(), _computed_in_float32(model.eval()):
        try:
            logits = [model(input_ids=row[None].to(model.device), use_cache=False).logits.float().cpu() for row in ids]
            return torch.cat(logits)
        finally:
            model.train(training)


def logits_or_none(model, ids):
    """As `logits_in_float32`; None, with a warning, for a model that cannot compute on the CPU."""
    try:
        return logits_in_float32(model, ids)
    except Exception as error:  # kernels that need a GPU, or a model's own code
        logger.warning(
            "the merged model cannot be compared with base and adapter, since the base cannot compute on the CPU "
            "({}: {}); compare a few answers before you use it",
            type(error).__name__,
            error,
        )
        return None


@contextmanager
def _computed_in_float32(model) -> Iterator[None]:
    """Within it each module computes with weights and inputs cast to float32, and gets its own weights back."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kept: list[list] = []

    def to_float32(value):
        is_low = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float32
        return value.float() if is_low else value

    def widen(module, args, kwargs):
        # PEFT's layers read the weights of the module that they wrap
        wraps = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        low = [p for p in module.parameters(recurse=wraps) if p.is_floating_point() and p.dtype != torch.float32]
        kept.append([(parameter, parameter.data) for parameter in low])
        for parameter in low:
            parameter.data = parameter.data.float()
        return tuple(map(to_float32, args)), {name: to_float32(value) for name, value in kwargs.items()}

    def restore(module, args, output):
        for parameter, data in kept.pop():
            parameter.data = data

    handles = []
    for module in model.modules():
        wraps = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if wraps or next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(widen, with_kwargs=True))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compare(base, adapter, merged) -> Compared:
    """Compares the logits of base, adapter and merged model.

    Args:
        base, adapter, merged: [rows, tokens, vocabulary]
    """
    difference = merged - adapter
    spread = adapter.std(dim=(1, 2)).clamp_min(1e-12)
    share = (difference.square().mean(dim=(1, 2)).sqrt() / spread).max()
    moved = adapter - base
    lost = difference.square().mean().sqrt() / moved.square().mean().sqrt().clamp_min(1e-30)
    return Compared(float(difference.abs().max()), float(share), float(moved.abs().max()), float(lost))


def refuse_difference(compared: Compared, dtype, what: str, path: str, rounding_only: bool = False) -> None:
    """Raises `MergeDiffers` if the merged model's logits differ from those of the base with its adapter.

    Args:
        compared: from `compare`.
        dtype: the smallest dtype of the merged weights.
        what: `"the merged model"`, or what else was compared, for the message.
        path: of the adapter, for the message.
        rounding_only: whether the same merge was correct in float32, so that only rounding can cause a difference.
    """
    name = str(dtype).removeprefix("torch.")
    allowed = TOLERANCE.get(name, TOLERANCE["bfloat16"])
    kept = rounding_only or compared.share <= NOISE or compared.lost <= (LOST if name == "float32" else MOST)
    if compared.share <= allowed and kept:  # a NaN is refused
        return
    raise MergeDiffers(
        f"{what} gives other logits than the base with the adapter {path!r}: {compared.text()} (root mean square "
        f"{100 * compared.share:.2g} % of the logits' spread; allowed for {name}: {100 * allowed:.2g} %; and "
        f"{100 * compared.lost:.3g} % of what the adapter changes). Nothing is written; use base and adapter together "
        "with infer, or with PEFT, or merge with --dtype float32"
    )
