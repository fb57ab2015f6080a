"""The small random model that stands in for a configuration's whole one: it is built, and keeps its kinds of layers."""

import pytest
import torch
from small_models import small
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from utils.model.small import small_config, small_model


@pytest.mark.parametrize(
    "kind", ["gemma3n_text", "gemma4_text", "kimi_linear", "laguna", "mamba2", "smollm3", "xlstm", "zamba2"]
)
def test_it_is_built_saved_and_causal(kind, tmp_path):
    model = small_model(CONFIG_MAPPING[kind]()).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        whole = loaded(input_ids=ids, use_cache=False).logits
        start = model(input_ids=ids[:, :12], use_cache=False).logits
    assert torch.allclose(whole[:, :12], start, atol=1e-3)
    assert model.num_parameters() < 2e6


def test_it_is_of_the_task_s_class():
    found = small_model(CONFIG_MAPPING["llama"](num_labels=3), auto_class="AutoModelForTokenClassification")
    assert type(found).__name__ == "LlamaForTokenClassification" and found.score.out_features == 3


def test_layers_keep_their_own_sizes_in_proportion():
    """Gemma 4: a full layer has heads of twice the size, and half the heads of keys here."""
    config = CONFIG_MAPPING["gemma4_text"](num_global_key_value_heads=2, attention_k_eq_v=True)
    small = small_config(config)
    assert small.layer_types == 5 * ["sliding_attention"] + ["full_attention"]
    assert [layer.head_dim for layer in small.per_layer_config] == [16] * 5 + [32]
    assert [layer.num_key_value_heads for layer in small.per_layer_config] == [2] * 5 + [1]
    assert [layer.head_dim for layer in config.per_layer_config][:6] == [256] * 5 + [512]  # as it was


def test_layers_that_share_keys_and_values_come_after_one_of_each_kind():
    small = small_config(CONFIG_MAPPING["gemma3n_text"]())
    assert small.num_hidden_layers == 10 and small.num_kv_shared_layers == 5
    assert small.layer_types == 2 * (4 * ["sliding_attention"] + ["full_attention"])
    assert small.kv_sharing_modes == [None, None, None, "store", "store"] + 5 * ["reuse"]
    assert small.intermediate_size == [128] * 10 and small.activation_sparsity_pattern == [0.95] * 10


def test_lists_with_an_entry_for_each_layer_are_cut():
    small = small_config(CONFIG_MAPPING["laguna"](num_attention_heads_per_layer=[48, 2] * 20))
    assert small.num_attention_heads_per_layer == [4, 2] and small.mlp_layer_types == ["dense", "sparse"]
    assert small_config(CONFIG_MAPPING["smollm3"]()).no_rope_layers == [1, 1, 1, 0]
    assert small_config(CONFIG_MAPPING["llama"](num_hidden_layers=4)).hidden_act == "silu"  # four letters, no list


def test_a_small_model_draws_no_random_numbers():
    """It is built on every process of ZeRO-3, after the seed is set: other numbers would be another order of rows."""
    state = torch.random.get_rng_state()
    small("qwen2")
    assert torch.equal(torch.random.get_rng_state(), state)
