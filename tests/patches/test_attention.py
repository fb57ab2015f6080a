"""Rows end to end are attended to one at a time: the same sums as under one block-diagonal mask."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from utils.patches.attention import _find_blocks, use_row_attention

MODULE = torch.nn.Module()


def mask_of(lengths, window=None):
    mask = torch.block_diag(*[torch.ones(length, length) for length in lengths]).tril().bool()
    if window:
        mask &= torch.ones_like(mask).triu(1 - window)
    return mask[None, None]


def attend(mask, split):
    use_row_attention()
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 2, mask.shape[-1], 8, generator=generator).requires_grad_() for _ in range(3)]
    function = AttentionInterface()["sdpa"] if split else sdpa_attention_forward
    output = function(MODULE, *states, mask)[0]
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    return [output.detach(), *(state.grad for state in states)]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [[7], [1, 6], [4, 1, 1, 9], [2, 30, 5]])
def test_the_same_as_under_one_mask(lengths, window):
    for ours, theirs in zip(*(attend(mask_of(lengths, window), split) for split in (True, False)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lengths", [[7], [4, 3]])
def test_a_cpu_attends_in_float32_while_it_trains(lengths, training):
    """Under autocast too. In bf16 the backward pass compiles a kernel for every length, which costs more than it."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if "scaled_dot_product" in operator.__name__:
                seen.append((operator.__name__.partition("_for_cpu")[2].partition(".")[0], args[0].dtype))
            return operator(*args, **(kwargs or {}))

    use_row_attention()
    seen, mask = [], mask_of(lengths) if len(lengths) > 1 else None
    states = [torch.randn(1, 2, 7, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16), Seen():
        output = AttentionInterface()["sdpa"](torch.nn.Module().train(training), *states, mask)[0]
        output.sum().backward()
    dtype = torch.float32 if training else torch.bfloat16
    assert seen == [("", dtype)] * len(lengths) + [("_backward", dtype)] * len(lengths)
    assert output.dtype == states[0].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["attention_mask", "position_bias"])
def test_what_is_added_to_the_scores_goes_to_float32_too(name):
    use_row_attention()
    states = [torch.randn(1, 2, 7, 8, dtype=torch.bfloat16) for _ in range(3)]
    added = torch.zeros(1, 1, 7, 7, dtype=torch.bfloat16).masked_fill(~mask_of([7]), -torch.inf)
    ours = AttentionInterface()["sdpa"](MODULE, *states, **{"attention_mask": None, name: added})[0]
    torch.testing.assert_close(ours, sdpa_attention_forward(MODULE, *states, mask_of([7]))[0], atol=0.05, rtol=0.05)


def test_a_row_is_causal_because_its_mask_was():
    use_row_attention()
    states = [torch.randn(1, 2, 7, 8) for _ in range(3)]
    ours, theirs = (
        attention(MODULE, *states, mask_of([4, 3]), is_causal=False)[0]
        for attention in (AttentionInterface()["sdpa"], sdpa_attention_forward)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_where_the_rows_lie():
    found = _find_blocks(mask_of([4, 1, 6], window=5))
    assert [length for length, _ in found] == [4, 1, 6]
    assert [mask is None for _, mask in found] == [True, True, False]  # only the last is longer than the window


def test_a_mask_shares_no_memory_with_its_rows():
    """A view would hold the mask that holds it, and neither would ever be freed."""
    mask = mask_of([4, 9], window=3)
    attend(mask, split=True)
    places = [block.untyped_storage().data_ptr() for *_, block in mask.row_blocks]
    assert len(places) == 2 and mask.untyped_storage().data_ptr() not in places


def test_a_mask_of_another_kind_is_left_as_it_is():
    mask = mask_of([4, 4])
    mask[0, 0, 6, 1] = True  # a token that looks into another row
    assert _find_blocks(mask) == []
    for ours, theirs in zip(attend(mask, True), attend(mask, False), strict=True):
        assert torch.equal(ours, theirs)
