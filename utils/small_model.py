"""A small random model of the same architecture, for checks that must not wait for the weights.

The class and every switch of the configuration stay; only sizes shrink, so what the code does with rows, masks and
positions is what it does at full size.
"""

import contextlib
import copy

from loguru import logger

# a field of a config.json → its size here; a field that a configuration lacks, or has as None, is left alone
_SIZES = {
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embed_dim": 64, "word_embed_proj_dim": 64,
    "embedding_size": 64, "input_embedding_size": 64, "d_embed": 64, "lru_width": 64,
    "intermediate_size": 128, "ffn_dim": 128, "ffn_hidden_size": 128, "n_inner": 128, "d_ff": 128,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "moe_intermediate_size": 32, "mlp_intermediate_size": 128,
    "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "intermediate_size_mlp": 128, "attention_hidden_size": 64,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "kv_channels": 16, "global_head_dim": 16,
    "decoder_layers": 2, "encoder_layers": 2, "n_layer": 2, "n_layers": 2,
    "vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_zero_experts": 1,
    "zero_expert_num": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "o_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_head_dim": 16, "v_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 16, "mamba_head_dim": 16,
    "mamba_n_groups": 1, "n_groups": 1, "mamba_d_ssm": 128, "mamba_dt_rank": 4, "time_step_rank": 4,
    "ssm_state_size": 8, "state_size": 8, "mamba_chunk_size": 8, "chunk_size": 8, "mamba_expand": 2,
    "qk_dim_factor": 0.5, "v_dim_factor": 1.0, "sliding_window": 16, "attention_window": 16, "window_size": 16,
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_LAYER_LISTS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "hybrid_override_pattern")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def small_model(config, sizes: dict | None = None, **options):
    """A small random float32 model on the CPU of the same class and switches; None where none can be built.

    Args:
        config: of the model at full size.
        sizes: fields of the configuration to set otherwise.
        **options: for `from_config`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():  # the random numbers of the run stay as they were
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(
                small_config(config, **(sizes or {})), dtype=torch.float32, **options
            )
        except Exception as error:  # configurations check their fields against each other
            logger.debug("no small model of this architecture can be built: {!r}", error)
            return None
        for weight in model.parameters():
            # usual starts are so small that a row hardly depends on the tokens before it
            if weight.dim() > 1:
                weight.data.normal_(std=0.3 if weight.shape[-1] < 8 else weight.shape[-1] ** -0.5)
    return model


def small_config(config, **sizes):
    """The configuration with small sizes and few layers, at least one of each kind.

    Args:
        config: transformers' PreTrainedConfig, which stays as it is.
        **sizes: fields to set otherwise.
    """
    small = copy.deepcopy(config)
    _shrink(small, sizes)
    for part in list(vars(small).values()):
        if hasattr(part, "to_dict"):
            _shrink(part, sizes)
    return small


def _shrink(config, sizes: dict) -> None:
    layers = _few_layers(config)
    equal_heads = _value(config, "num_key_value_heads") == _value(config, "num_attention_heads")
    for name, size in {**_SIZES, **layers, **sizes}.items():
        current = _value(config, name)
        if isinstance(current, int | float) and not isinstance(current, bool):
            _set(config, name, size if name in sizes or name in layers else min(current, size))
    if equal_heads:
        _set(config, "num_key_value_heads", _value(config, "num_attention_heads"))
    if _value(config, "qk_rope_head_dim") and _value(
        config, "qk_nope_head_dim"
    ):  # multi-head latent attention: the rotary part is a head of its own
        _set(config, "head_dim", config.qk_rope_head_dim)
        _set(config, "qk_head_dim", config.qk_rope_head_dim + config.qk_nope_head_dim)
    if isinstance(_value(config, "rotary_dim"), int):
        _set(config, "rotary_dim", 8)
    for name in _TOKENS:
        token = _value(config, name)
        if isinstance(token, int) and token >= (_value(config, "vocab_size") or token + 1):
            _set(config, name, 1)


def _value(config, name: str):
    """A field, or None where there is none, also where it may only be read layer by layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # configurations raise their own
        return None


def _set(config, name: str, value) -> None:
    with contextlib.suppress(Exception):  # a property that is derived from other fields
        setattr(config, name, value)


def _few_layers(config) -> dict:
    """Two layers, or as many as it takes for one of each kind."""
    kinds = {name: _value(config, name) for name in _LAYER_LISTS}
    kinds = {name: each for name, each in kinds.items() if isinstance(each, list | tuple | str) and len(each)}
    count = 2
    for each in kinds.values():
        count = max(count, 1 + max(each.index(kind) for kind in set(each)))
    for name, each in kinds.items():
        _set(config, name, each[:count])
    return {name: count for name in _LAYERS if isinstance(_value(config, name), int)}
