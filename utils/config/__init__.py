"""Flags, a recipe and `--config` → checked arguments. `utils.args.parse_args` runs the steps.

In reading order: flags, recipe, config_file, provenance, precision, defaults, from_adapter, deepspeed, best_model,
replaced, validate.
"""
