"""Small GGUF files, written as llama.cpp's convert_hf_to_gguf.py writes them."""

import json

import tiny

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def small_llama(**changes):
    """A random llama, with its tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = tiny.byte_level_tokenizer()
    torch.manual_seed(0)
    config = tiny.config_for("llama", len(tokenizer), tie_word_embeddings=False, **changes)
    return LlamaForCausalLM(config).eval(), tokenizer


def gguf_tensors(model) -> dict:
    """llama.cpp's name → numpy array; rows of q and k in its order, in which the halves of a head alternate."""
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    found = {}
    for name, weight in model.state_dict().items():
        array, module = weight.float().numpy(), name.removesuffix(".weight")
        if module in outer:
            found[f"{outer[module]}.weight"] = array
            continue
        _, _, layer, inner = module.split(".", 3)
        own = _LAYER[inner]
        if own in heads:
            halves = array.reshape(heads[own], 2, array.shape[0] // heads[own] // 2, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        found[f"blk.{layer}.{own}.weight"] = array
    return found


def write_gguf(
    path, model, tokenizer=None, kind="F32", settings=(), tensors=(), architecture="llama", template=None, pre="gpt-2"
):
    """Writes a GGUF file.

    Args:
        path: of the file.
        model: from `small_llama`.
        tokenizer: its tokenizer; None for a file without.
        kind: ggml's type of the matrices; norms are F32.
        settings: more metadata, name → value; None leaves one out.
        tensors: more tensors, name → array.
        architecture: as the file names it.
        template: the chat template.
        pre: the name of the rule by which text is split.
    """
    import gguf
    from gguf.quants import quantize

    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    values = {
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{architecture}.rope.dimension_count": config.head_dim,
        f"{architecture}.vocab_size": config.vocab_size,
        "general.name": "tiny", **dict(settings),
    }  # fmt: skip
    for name, value in values.items():
        if value is None:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(name, value)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, template, pre)
    chosen = getattr(gguf.GGMLQuantizationType, kind)
    for name, array in {**gguf_tensors(model), **dict(tensors)}.items():
        own = chosen if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(array, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer, tokenizer, template, pre):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {entry["content"] for entry in state["added_tokens"]}
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(template)
