"""The base, the tokenizer, the weights, the adapters, and the probe of how a model lays out rows.

In reading order: source, gguf, gguf_file, named_models, tokenizer, new_tokens, load, rope, quantised, adapter,
adapter_targets, expert_targets, trainable, adapter_files, probe, layout, head.
"""
