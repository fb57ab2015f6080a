"""Flags of the parent classes that another flag replaces here."""

import dataclasses

from utils.runtime.errors import Problem, refusal

# given, they would do nothing; the flag that replaces each, and what else there is to say
REPLACED_FLAGS = {
    "max_length": ("max_len", ""),
    "chat_template_path": ("template_name", ""),
    "eos_token": ("template_name", ""),
    "pad_token": ("template_name", ""),
    "truncation_mode": ("max_len", ""),
    "completion_only_loss": ("template_name", " (labels cover the answers and their stop tokens)"),
    "assistant_only_loss": ("template_name", " (labels cover the answers and their stop tokens)"),
    "dataset_text_field": ("train_data_path", " (the fields are listed in docs/data.md)"),
    "dataset_kwargs": ("train_data_path", ""),
    "packing_strategy": ("packing", " (best fit, on whole rows)"),
    "eval_packing": ("packing", ""),
    "pad_to_multiple_of": ("padding_free", ""),
    "shuffle_dataset": ("seed", " (rows are shuffled in every epoch)"),
    "model_init_kwargs": ("precision", ", attn_implementation and trust_remote_code"),
}


def check_replaced(recipe: type, values: dict, given: set[str]) -> list[Problem]:
    """Refuses a replaced flag that was given, or that the recipe sets; returns the problems."""
    problems = []
    parent = {f.name: f.default for f in dataclasses.fields(recipe.__mro__[1])}
    for old, (new, note) in REPLACED_FLAGS.items():
        if old in given or (old in parent and values.get(old) != parent[old]):
            problems += refusal(f"--{old} has no effect here; use --{new}{note}", old, new)
    return problems
