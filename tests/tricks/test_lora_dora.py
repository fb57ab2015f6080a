"""LoRA and DoRA of the notebook against PEFT's."""

import runpy

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from torch import nn

from llm_tricks.notebook import definitions

nb = definitions("lora_dora")


def both(use_dora: bool, rank: int, bias: bool = True):
    """The notebook's layer and PEFT's, with the same random weights, some steps after the start."""
    torch.manual_seed(rank)
    base = nn.Linear(24, 16, bias=bias)
    ours = (nb.DoRALinear if use_dora else nb.LoRALinear)(base, rank=rank, alpha=2 * rank + 1)
    with torch.no_grad():
        ours.B.normal_()
        if use_dora:
            ours.m.mul_(torch.rand(16, 1) + 0.5)
    twin = nn.Linear(24, 16, bias=bias)
    twin.load_state_dict(base.state_dict())
    config = LoraConfig(r=rank, lora_alpha=2 * rank + 1, target_modules=["0"], use_dora=use_dora)
    model = get_peft_model(nn.Sequential(twin), config)
    theirs = model.base_model.model[0]
    pairs = [(ours.A, theirs.lora_A["default"].weight), (ours.B, theirs.lora_B["default"].weight)]
    if use_dora:
        pairs.append((ours.m, theirs.lora_magnitude_vector["default"].weight))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.reshape(other.shape))
    return ours, model, pairs


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradients_are_pefts(use_dora, rank, bias):
    ours, theirs, pairs = both(use_dora, rank, bias)
    x = torch.randn(5, 7, 24)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(5, 7, 16)
    (ours(mine) * weight).sum().backward()
    (theirs(other) * weight).sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)
    for one, two in pairs:
        torch.testing.assert_close(one.grad.reshape(two.grad.shape), two.grad, rtol=1e-5, atol=1e-5)
    assert ours.base.weight.grad is None


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_first_forward_is_the_bases_and_merging_changes_nothing(use_dora):
    base = nn.Linear(24, 16)
    layer = (nb.DoRALinear if use_dora else nb.LoRALinear)(base, rank=4, alpha=8)
    x = torch.randn(5, 24)
    assert torch.equal(layer(x), base(x))
    ours, theirs, _ = both(use_dora, 4)
    torch.testing.assert_close(ours.merged()(x), ours(x), rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()[0]
    torch.testing.assert_close(ours.merged().weight, merged.weight, rtol=1e-5, atol=1e-5)


def test_pefts_dora_starts_at_the_norm_of_each_output():
    base = nn.Linear(24, 16)
    ours = nb.DoRALinear(base, rank=4, alpha=8)
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=4, target_modules=["0"], use_dora=True))
    theirs = model.base_model.model[0].lora_magnitude_vector["default"].weight
    torch.testing.assert_close(ours.m.squeeze(1), theirs)


def test_the_parts_share_no_picture_and_every_adapter_has_the_same_scale():
    parts = [set(range(1797)[part]) for part in (nb.BASE_PART, nb.TUNE_PART, nb.TEST_PART)]
    assert [len(part) for part in parts] == [600, 300, 897] and len(set.union(*parts)) == 1797
    script = runpy.run_path(str(ROOT / "llm_tricks" / "lora_dora" / "run.py"))
    tune, choose = (set(range(1797)[script[name]]) for name in ("TUNE", "CHOOSE"))
    assert tune | choose == parts[1] and not tune & choose
    for kind in script["ADAPTERS"]:
        layers = [layer for layer in nb.adapt(nb.network(), kind, 4) if isinstance(layer, nb.LoRALinear)]
        assert [layer.scale for layer in layers] == [2, 2, 2], kind
        assert kind == "lora" or {layer.norm_is_constant for layer in layers} == {kind == "dora"}, kind
