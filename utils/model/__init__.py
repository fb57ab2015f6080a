"""The tokenizer, the weights, the adapters, and the probe of how a model lays out rows.

In reading order: tokenizer, load, quantised, adapter, adapter_targets, adapter_files, probe, layout, head.
"""
