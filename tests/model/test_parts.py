"""Shares of a model's weights, where some are packed into fewer numbers."""

import pytest
import torch

from utils.model.parts import count_weights, frozen_tensors


def packed(inputs, outputs):
    from bitsandbytes.nn import Params4bit

    return Params4bit(torch.randn(outputs, inputs), requires_grad=False, quant_type="nf4").to("cpu")


def test_weights_in_4_bits_are_counted_and_not_their_bytes():
    weight = packed(64, 32)
    assert weight.numel() == 64 * 32 // 2  # two in each byte
    assert count_weights(weight) == 64 * 32
    assert count_weights(torch.nn.Parameter(torch.zeros(3, 5))) == 15


def test_the_experts_share_is_the_same_in_4_bits(tmp_path):
    import tiny
    from transformers import AutoModelForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(tiny.config_for("qwen3_moe", 512, **experts))
    ((name, share),) = frozen_tensors(model)
    assert name == "model.layers.N.mlp.experts"
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight = packed(64, 64)
    ((_, in_4_bits),) = frozen_tensors(model)
    assert in_4_bits == pytest.approx(share)
