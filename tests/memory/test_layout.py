"""Bytes of a quantised weight and of an optimizer's states, as the libraries allocate them."""

import pytest
from conftest import ROOT
from planning import parse_run

from utils.memory.layout import optimizer_states, quantised_bytes


@pytest.mark.parametrize("shape", [(256, 256), (704, 256), (128, 64), (100, 30)])
def test_a_quantised_weight_has_the_bytes_of_bitsandbytes(shape):
    import torch
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(shape).bfloat16(), quant_type="nf4", compress_statistics=True)
    found = quantised_bytes(shape[0] * shape[1])
    parts = (packed, state.absmax, state.offset, state.state2.absmax, state.code, state.state2.code)
    sizes = [part.untyped_storage().nbytes() for part in parts]
    assert (found.packed, found.scales, found.codes) == (sizes[0], sum(sizes[1:4]), sum(sizes[4:]))


def test_optimizer_states_equal_those_of_a_real_step():
    import torch

    _, train_args = parse_run(ROOT / "data" / "tiny_model", "--optim", "adafactor")
    shapes = [(40, 30), (7,)]
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(train_args)
    optimizer = kind(weights, **options)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    kept = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    assert kept >= (40 + 30 + 7) * 4
    assert optimizer_states(train_args, [torch.empty(shape, device="meta") for shape in shapes]) == kept
