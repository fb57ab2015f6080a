"""Builds a small random model of the same architecture, for checks before the weights are loaded.

Class and switches of the configuration are kept and only sizes shrink, so the code treats rows, masks and positions as
at full size.
"""

import contextlib
import copy

from loguru import logger

# field of config.json → its small size; applied if the configuration has the field with a larger value
_SIZES = {
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embed_dim": 64, "word_embed_proj_dim": 64,
    "embedding_size": 64, "embedding_dim": 64, "input_embedding_size": 64, "d_embed": 64, "lru_width": 64,
    "intermediate_size": 128, "ffn_dim": 128, "ffn_hidden_size": 128, "n_inner": 128, "d_ff": 128,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "moe_intermediate_size": 32, "mlp_intermediate_size": 128,
    "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "intermediate_size_mlp": 128, "attention_hidden_size": 64,
    "num_attention_heads": 4, "num_attention_heads_per_layer": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "kv_channels": 16, "global_head_dim": 16,
    "decoder_layers": 2, "encoder_layers": 2, "n_layer": 2, "n_layers": 2,
    "vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_zero_experts": 1,
    "zero_expert_num": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "o_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_head_dim": 16, "v_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64,
    "linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 16, "mamba_head_dim": 16,
    "mamba_n_groups": 1, "n_groups": 1, "mamba_d_ssm": 128, "mamba_dt_rank": 4, "time_step_rank": 4,
    "ssm_state_size": 8, "state_size": 8, "mamba_chunk_size": 8, "chunk_size": 8, "mamba_expand": 2,
    "qk_dim_factor": 0.5, "v_dim_factor": 1.0, "sliding_window": 16, "attention_window": 16, "window_size": 16,
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_LAYER_LISTS = (
    "layer_types", "layers_block_type", "block_types", "mlp_layer_types", "hybrid_override_pattern", "indexer_types",
    "no_rope_layers", "attention_layers", "attn_layers",
)  # fmt: skip
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def small_model(config, sizes: dict | None = None, auto_class: str = "AutoModelForCausalLM", **options):
    """Builds a small random float32 model of the same class on the CPU; None if that fails.

    Args:
        config: of the model at full size.
        sizes: fields of the configuration to set to other sizes.
        auto_class: the transformers class that builds the model, as a task names it.
        **options: for `from_config`.
    """
    import torch
    import transformers

    with torch.random.fork_rng():  # the run's random state is unchanged afterwards
        torch.manual_seed(0)
        try:
            model = getattr(transformers, auto_class).from_config(
                small_config(config, **(sizes or {})), dtype=torch.float32, **options
            )
        except Exception as error:  # configurations check their fields against each other
            logger.debug("no small model of this architecture can be built: {!r}", error)
            return None
        for weight in model.parameters():
            # with the usual initialisation logits hardly depend on earlier tokens
            if weight.dim() > 1:
                weight.data.normal_(std=0.3 if weight.shape[-1] < 8 else weight.shape[-1] ** -0.5)
    return model


def small_config(config, **sizes):
    """Returns the configuration with small sizes and few layers, at least one of each kind.

    Args:
        config: transformers' PreTrainedConfig, which is not changed.
        **sizes: fields to set to other sizes.
    """
    small = copy.deepcopy(config)
    _shrink(small, sizes)
    for part in list(vars(small).values()):
        if hasattr(part, "to_dict"):
            _shrink(part, sizes)
    return small


def _shrink(config, sizes: dict) -> None:
    overrides = _take_overrides(config)
    kept = _kept_layers(config)
    layers = _cut_layers(config, kept)
    before = {name: _value(config, name) for fields in overrides.values() for name in fields}
    equal_heads = _value(config, "num_key_value_heads") == _value(config, "num_attention_heads")
    double_width = _value(config, "attention_hidden_size") == 2 * (_value(config, "hidden_size") or 0) > 0
    for name, size in {**_SIZES, **layers, **sizes}.items():
        current = _value(config, name)
        if _is_number(current):
            _set(config, name, size if name in sizes or name in layers else min(current, size))
        elif isinstance(current, list) and all(map(_is_number, current)):  # a size for each layer
            _set(config, name, [min(value, size) for value in current])
    _fit_heads(config, equal_heads, double_width)
    _set_overrides(config, [overrides.get(layer, {}) for layer in kept], before)
    for name in _TOKENS:
        token = _value(config, name)
        if isinstance(token, int) and token >= (_value(config, "vocab_size") or token + 1):
            _set(config, name, 1)


def _fit_heads(config, equal_heads: bool, double_width: bool) -> None:
    """Sets the sizes that follow from others.

    Args:
        config: with small sizes.
        equal_heads: whether keys had as many heads as queries.
        double_width: whether attention had twice the width of the hidden states, as in Zamba.
    """
    if equal_heads:
        _set(config, "num_key_value_heads", _value(config, "num_attention_heads"))
    if _value(config, "qk_rope_head_dim") and _value(config, "qk_nope_head_dim"):
        # multi-head latent attention: the rotary part is a head of its own
        _set(config, "head_dim", config.qk_rope_head_dim)
        _set(config, "qk_head_dim", config.qk_rope_head_dim + config.qk_nope_head_dim)
    if double_width:
        _set(config, "attention_hidden_size", 2 * config.hidden_size)
        _set(config, "attention_head_dim", 2 * config.hidden_size // config.num_attention_heads)
    if _value(config, "mamba_headdim") and _value(config, "n_mamba_heads"):  # Zamba 2
        _set(config, "mamba_headdim", config.mamba_expand * config.hidden_size // config.n_mamba_heads)
    if _value(config, "expand") and _value(config, "num_heads") and _value(config, "head_dim"):  # Mamba 2
        _set(config, "num_heads", config.expand * config.hidden_size // config.head_dim)
    if isinstance(_value(config, "rotary_dim"), int):
        _set(config, "rotary_dim", 8)


def _value(config, name: str):
    """A field; None if it does not exist or can only be read layer by layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # configurations raise their own
        return None


def _set(config, name: str, value) -> None:
    with contextlib.suppress(Exception):  # a property that is derived from other fields
        setattr(config, name, value)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kept_layers(config) -> list[int]:
    """The layers of the small model, by their index in the full model.

    They are the first two, or as many as include one of each kind; twice if the last layers share the keys and values
    of earlier ones.
    """
    count = 2
    for name in _LAYER_LISTS:
        kinds = _value(config, name)
        if isinstance(kinds, list | tuple | str) and len(kinds):
            count = max(count, 1 + max(kinds.index(kind) for kind in set(kinds)))
    shared = _value(config, "num_kv_shared_layers") or 0
    return list(range(count)) * (2 if 0 < shared < _number_of_layers(config) else 1)


def _number_of_layers(config) -> int:
    return next((number for name in _LAYERS if isinstance(number := _value(config, name), int)), 0)


def _cut_layers(config, kept: list[int]) -> dict:
    """Shortens the fields with an entry per layer; returns the fields that count layers, with their new values."""
    number = _number_of_layers(config)
    for name, value in list(vars(config).items()):
        listed = isinstance(value, list | tuple) and len(value) == number
        if (listed or name in _LAYER_LISTS and isinstance(value, list | tuple | str)) and len(value) > max(kept):
            entries = [value[layer] for layer in kept]
            _set(config, name, "".join(entries) if isinstance(value, str) else type(value)(entries))
    layers = {name: len(kept) for name in _LAYERS if isinstance(_value(config, name), int)}
    if _value(config, "num_kv_shared_layers"):
        layers["num_kv_shared_layers"] = len(set(kept))
    return layers


def _take_overrides(config) -> dict[int, dict]:
    """Removes and returns the fields that differ between layers, by layer: transformers' `per_layer_config`."""
    if not _value(config, "is_heterogeneous"):
        return {}
    overrides = config.to_dict()["per_layer_config"]
    config.per_layer_config = None  # the fields can be read only without it
    return {int(layer): fields for layer, fields in overrides.items()}


def _set_overrides(config, overrides: list[dict], before: dict) -> None:
    """Sets the sizes of single layers, in the same proportion to the common sizes as at full size.

    Args:
        config: with small sizes.
        overrides: per layer of the small model, its own fields at full size.
        before: the common fields at full size.
    """
    found: dict = {}
    for layer, fields in enumerate(overrides):
        for name, value in fields.items():
            if _is_number(value) and _is_number(before[name]) and before[name]:
                value = max(1, type(value)(_value(config, name) * value / before[name]))
            found.setdefault(layer, {})[name] = value
    if found:
        config.per_layer_config = found
