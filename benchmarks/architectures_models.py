"""The small random models that benchmarks/architectures.py trains, and the rows they are trained on."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "data" / "tiny_model"
_QWEN4_EXP = {
    "head_dim": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}  # fmt: skip
# what a default configuration lacks, or has at a size that does not shrink
SWITCHES = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "blt": {
        "encoder_hash_byte_group_vocab": 500,
        "encoder_config": {"hidden_size": 32, "num_attention_heads": 4, "hidden_size_global": 64},
        "decoder_config": {"hidden_size": 32, "num_attention_heads": 4, "hidden_size_global": 64},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hrm_text": {"num_hidden_layers": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "qwen4_exp_text": _QWEN4_EXP,
    "qwen4_exp": {"text_config": _QWEN4_EXP},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32]},
    "xlnet": {"d_model": 64, "n_head": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["hybrid", "hybrid", "linear_attention"], "num_hidden_layers": 3},
    "nemotron": {"num_key_value_heads": 4},
    "ministral": {"head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
}  # fmt: skip
SIZES = {"hrm_text": {"num_hidden_layers": 8}}  # it computes its one layer so often, each time with its own cache
ROWS = [
    {"instruction": "What is the capital of France?", "output": "Paris."},
    {"instruction": "Count.", "input": "to ten, please", "output": "1 2 3 4 5 6 7 8 9 10"},
    {"instruction": "Be brief.", "system": "You are lazy.", "history": [["Hi", "Hello"]], "output": "Yes."},
    {"instruction": "Say hello.", "output": "Hello, quick brown fox! " * 8},
    {"instruction": "Goodbye.", "output": "Goodbye, and thank you."},
    {"instruction": "The dog?", "output": "The lazy dog sleeps in the sun."},
]


def build(kind: str, folder: Path) -> None:
    """Saves the small random model with a tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

    from utils.model.small import small_config, small_model

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = CONFIG_MAPPING[kind](**SWITCHES.get(kind, {}))
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)  # it would draw other random numbers in another layout
    # tokens that sparse attention chooses: as in real models, which are not causal in rows of more
    sizes = {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer), "index_topk": 2048}
    sizes |= SIZES.get(kind, {})
    model = small_model(config, sizes)
    if model is None:
        AutoModelForCausalLM.from_config(small_config(config, **sizes))  # raises the reason
        raise ValueError("no small configuration fits together")
    if model.num_parameters() > 1e8:
        raise ValueError(f"{model.num_parameters():,} weights are too many")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(kind: str, folder: Path) -> tuple[Path, list[dict]]:
    """Builds the base in a folder; returns its path, and the rows with ids and labels."""
    from transformers import AutoTokenizer

    from utils.data.conversations import to_messages
    from utils.template import get_template

    base = folder / "base"
    build(kind, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = get_template("qwen", tokenizer)
    return base, [template.encode(to_messages(row), tokenizer) for row in ROWS]
