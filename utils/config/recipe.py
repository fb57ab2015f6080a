"""Loads a recipe, a file of train_args/, as a dataclass; and the flags of its parents that another flag replaces."""

import dataclasses
import importlib.util
import sys
from collections.abc import Collection
from enum import Enum
from pathlib import Path
from typing import get_args, get_type_hints

from utils.patches.lazy_imports import import_peft
from utils.runtime.errors import Problem, UserError, nearest, refusal
from utils.storage.files import ROOT, project_path

# flag of a parent class that has no effect here → the flag that replaces it, and a note
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


def load_recipe(path: str, ours: frozenset[str] = frozenset(), tasks: Collection[str] = ()) -> type:
    """Imports a recipe file and returns its `TrainArgument`.

    Args:
        path: the file.
        ours: names of CommonArgs, which a recipe must not set.
        tasks: the names of all tasks; empty to allow any.

    Raises:
        UserError: no such file, or no dataclass `TrainArgument` made for a task.
    """
    import_peft()
    recipe = getattr(_import_file(path), "TrainArgument", None)
    _check_class(path, recipe, ours, tasks)
    _inherit_help(recipe)
    return recipe


def _import_file(path: str):
    """Runs the recipe's file; returns it as a module."""
    file = Path(project_path(path))
    if not file.is_file():
        recipes = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "train_args").glob("*/*.py"))
        message = (
            f"--train_args_path {path!r} is not a file.{nearest(path, recipes)} Recipes here: {', '.join(recipes)}"
        )
        raise UserError(Problem(message, flags=("train_args_path",)))
    # a fixed name, so that a checkpoint's pickled arguments find their class again
    name = "recipe_" + "_".join(file.resolve().with_suffix("").parts[-3:]).replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise UserError(*refusal(f"--train_args_path {path!r} is not a Python file (*.py)", "train_args_path"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"the recipe {path!r} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _check_class(path: str, recipe, ours: frozenset[str], tasks: Collection[str]) -> None:
    """Raises UserError unless `recipe` is a dataclass of transformers' arguments that names its tasks."""
    from transformers import TrainingArguments

    if not (dataclasses.is_dataclass(recipe) and issubclass(recipe, TrainingArguments)):
        raise UserError(
            f"the recipe {path!r} has no dataclass TrainArgument that extends TrainingArguments (or TRL's SFTConfig, "
            "DPOConfig); see train_args/sft/base.py"
        )
    if not getattr(recipe, "task_types", ()):
        raise UserError(f"the recipe {path!r} names no task; give TrainArgument task_types = ('sft',), for example")
    unknown = [task for task in recipe.task_types if tasks and task not in tasks]
    if unknown:
        raise UserError(f"the recipe {path!r} names the task {unknown[0]!r}; allowed are {', '.join(tasks)}")
    clash = sorted(ours & set(recipe.__dict__.get("__annotations__", {})))
    if clash:
        raise UserError(f"the recipe {path!r} sets {', '.join(clash)}, which belong to utils/args.py; set them there")


def _inherit_help(recipe: type) -> None:
    """Copies help and choices from the parent class to the fields whose default the recipe changes."""
    for parent in recipe.__mro__[1:]:
        if not dataclasses.is_dataclass(parent):
            continue
        hints, theirs = get_type_hints(parent), {f.name: f for f in dataclasses.fields(parent)}
        for own in dataclasses.fields(recipe):
            if own.name in theirs and not own.metadata:
                kinds = [hints[own.name], *get_args(hints[own.name])]
                enum = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)), None)
                choices = {"choices": [choice.value for choice in enum]} if enum else {}
                own.metadata = {**theirs[own.name].metadata, **choices}


def validate(settings) -> list[Problem]:
    """Refuses a replaced flag that was given, or that the recipe sets."""
    problems = []
    parent = {f.name: f.default for f in dataclasses.fields(settings.recipe.__mro__[1])}
    for old, (new, note) in REPLACED_FLAGS.items():
        if old in settings.given or (old in parent and settings.requested.get(old) != parent[old]):
            problems += refusal(f"--{old} has no effect here; use --{new}{note}", old, new)
    return problems
