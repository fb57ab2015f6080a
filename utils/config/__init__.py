"""Flags, a recipe and `--config` → checked arguments.

In reading order: parse (the steps and their order), settings (what the steps work on), flags, recipe, config_file,
provenance; then the steps: defaults, from_adapter, model_path, best_model, deepspeed, trainer_args, output_dir,
validate, optimizer, mixing, streaming.
"""
