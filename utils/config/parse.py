"""Parses the command line: flags, the recipe and `--config` → checked arguments. Here is the order of the steps."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from utils.config import (
    best_model,
    deepspeed,
    defaults,
    from_adapter,
    mixing,
    model_path,
    optimizer,
    output_dir,
    recipe,
    streaming,
    trainer_args,
    validate,
)
from utils.config.config_file import read_config
from utils.config.flags import hints_of, make_parser, read_flags, value_of
from utils.config.provenance import Sources
from utils.config.settings import Settings
from utils.model.source import is_source, make_folder
from utils.runtime.distributed import broadcast_object
from utils.runtime.errors import Problem, UserError, raise_if_any
from utils.runtime.log import is_main_process


class Step(NamedTuple):
    """A step of parsing: `resolve(settings)` fills values in, then `validate(settings)` returns the problems.

    `needs_train_args`: skipped where the trainer's arguments could not be built.
    """

    name: str
    resolve: Callable[[Settings], None] | None = None
    validate: Callable[[Settings], list[Problem]] | None = None
    needs_train_args: bool = False


def _validate_task(settings: Settings) -> list[Problem]:
    task = settings.task
    # with the recipe of another task, which is refused, the values that the task checks are missing
    fits = task is not None and task.name in settings.recipe.task_types
    return task.check(settings.common, settings.train_args) if fits else []


# a step reads what those before it have resolved
STEPS = (
    Step("recipe", validate=recipe.validate),
    Step("defaults", defaults.resolve, defaults.validate),
    Step("from_adapter", from_adapter.resolve, from_adapter.validate),
    Step("model_path", model_path.resolve, model_path.validate),
    Step("best_model", best_model.resolve, best_model.validate),
    Step("deepspeed", deepspeed.resolve, deepspeed.validate),
    Step("trainer_args", trainer_args.resolve),
    Step("deepspeed", deepspeed.resolve_plugin, deepspeed.validate_plugin, needs_train_args=True),
    Step("output_dir", output_dir.resolve, output_dir.validate, needs_train_args=True),
    Step("validate", validate=validate.validate),
    Step("optimizer", validate=optimizer.validate, needs_train_args=True),
    Step("mixing", validate=mixing.validate, needs_train_args=True),
    Step("streaming", validate=streaming.validate, needs_train_args=True),
    Step("task", validate=_validate_task, needs_train_args=True),
)


def parse(argv: list[str], common_type: type, tasks: Mapping[str, Any], needs_weights: bool = True):
    """Reads the flags, the recipe and the file of `--config`, then runs the steps.

    Args:
        argv: the flags.
        common_type: the dataclass CommonArgs.
        tasks: name → Task. Of a task the steps read `name`, `sample_data` (a training and an evaluation file, or
            None), `sample_settings` (settings of CommonArgs that the sample needs), `file_suffixes`, `metrics` (name →
            whether greater is better) and `check(common, train_args)`, which returns problems.
        needs_weights: whether the base must have weights beside its config.json.

    Returns:
        (CommonArgs, TrainArgument, Sources)

    Raises:
        UserError: with every problem found.
    """
    config_path, path = value_of(argv, "config"), value_of(argv, "train_args_path")  # they decide which flags exist
    config = read_config(config_path)
    path = config.recipe() or common_type.train_args_path if path is None else path
    common_names = frozenset(field.name for field in dataclasses.fields(common_type))
    recipe_type = recipe.load_recipe(path, common_names, tasks)
    parser = _make_parser(recipe_type, common_type)
    values, given, problems = read_flags(parser, argv)
    hints = hints_of((recipe_type, common_type))
    sources = Sources(recipe_type, common_type)
    sources.note_flags(parser, argv, values, given)
    problems += config.apply(values, given, hints)
    sources.note_config(config, values)
    common = common_type(**{name: values[name] for name in common_names & values.keys()})
    requested = MappingProxyType(dict(values))
    settings = Settings(common, values, requested, frozenset(given), recipe_type, tasks, needs_weights)
    run_steps(settings, sources, problems)
    if is_main_process():
        config.warn(common)
    return common, settings.train_args, sources


def run_steps(settings: Settings, sources: Sources, problems: list[Problem]) -> None:
    """Resolves and validates each step in turn, and notes where the values come from.

    Raises:
        UserError: with `problems` and those that the steps found.
    """
    shared: list[Problem] = []
    for step in STEPS:
        if step.needs_train_args and settings.train_args is None:
            continue
        if step.resolve is not None:
            try:
                step.resolve(settings)
            except UserError as error:
                problems += error.problems
            sources.note_step(step.name, settings.train_args or settings.values, settings.common)
        if step.validate is not None:
            (problems if settings.train_args is None else shared).extend(step.validate(settings))
    common, train_args = settings.common, settings.train_args
    if train_args is None:
        raise UserError(*problems)
    # disk and clock differ between processes; once there is a process group, the first process decides for all
    problems = [*problems, *broadcast_object(shared)]
    train_args.output_dir, train_args.resume_from_checkpoint, common.template_date = broadcast_object(
        (train_args.output_dir, train_args.resume_from_checkpoint, common.template_date)
    )
    raise_if_any(problems)
    _make_base(settings)


def _make_base(settings: Settings) -> None:
    """Downloads or converts the base of a short name or a GGUF file, once everything else is checked.

    Raises:
        UserError: it cannot be made, or an adapter was trained on another one.
    """
    common = settings.common
    if is_source(common.model_name_or_path):
        common.model_name_or_path = make_folder(common.model_name_or_path)
        raise_if_any([*from_adapter.validate(settings), *model_path.validate(settings)])


def _make_parser(recipe_type: type, common_type: type):
    """The parser of main_train.py's flags, with the common arguments first in its help."""
    # common_type comes last: it wins where TRL has a field of the same name
    about = "Fine-tunes a language model by a recipe of train_args/. Every flag is also a default to edit."
    parser = make_parser([recipe_type, common_type], "main_train.py", about)
    for action in parser._actions:
        if action.dest in recipe.REPLACED_FLAGS:
            action.help = argparse.SUPPRESS
        if action.dest == "report_to":  # TrainingArguments takes a list, HfArgumentParser a single word
            action.nargs = "+"
    common = next(group for group in parser._action_groups if group.title == common_type._argument_group_name)
    parser._action_groups.remove(common)
    parser._action_groups.insert(0, common)
    return parser
