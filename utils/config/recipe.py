"""Recipes: a file of train_args/ → its dataclass."""

import dataclasses
import importlib.util
import sys
from enum import Enum
from pathlib import Path
from typing import get_args, get_type_hints

from utils.config.defaults import KNOWN_TASKS
from utils.patches.lazy_imports import import_peft
from utils.runtime.errors import Problem, UserError, nearest, refusal
from utils.storage.files import ROOT, project_path


def load_recipe(path: str, ours: frozenset[str] = frozenset()) -> type:
    """Imports a recipe file and returns its `TrainArgument`.

    Args:
        path: the file.
        ours: names of CommonArgs, which a recipe must not set.

    Raises:
        UserError: no such file, or no dataclass `TrainArgument` made for a task.
    """
    import_peft()
    from transformers import TrainingArguments

    file = Path(project_path(path))
    if not file.is_file():
        recipes = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "train_args").glob("*/*.py"))
        message = (
            f"--train_args_path {path!r} is not a file.{nearest(path, recipes)} Recipes here: {', '.join(recipes)}"
        )
        raise UserError(Problem(message, flags=("train_args_path",)))
    # a name of its own, so that a checkpoint's pickled arguments find their class again
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
    recipe = getattr(module, "TrainArgument", None)
    if not (dataclasses.is_dataclass(recipe) and issubclass(recipe, TrainingArguments)):
        raise UserError(
            f"the recipe {path!r} has no dataclass TrainArgument that extends TrainingArguments (or TRL's SFTConfig, "
            "DPOConfig); see train_args/sft/base.py"
        )
    if not getattr(recipe, "task_types", ()):
        raise UserError(f"the recipe {path!r} names no task; give TrainArgument task_types = ('sft',), say")
    unknown = [task for task in recipe.task_types if task not in KNOWN_TASKS]
    if unknown:
        raise UserError(f"the recipe {path!r} names the task {unknown[0]!r}; allowed are {', '.join(KNOWN_TASKS)}")
    clash = sorted(ours & set(recipe.__dict__.get("__annotations__", {})))
    if clash:
        raise UserError(f"the recipe {path!r} sets {', '.join(clash)}, which belong to utils/args.py; set them there")
    _inherit_help(recipe)
    return recipe


def _inherit_help(recipe: type) -> None:
    """A default that a recipe changes keeps the help and the choices of the class it extends."""
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
