"""Builds the recipe's TrainArgument, transformers' TrainingArguments, from the resolved values."""

import dataclasses

from utils.config.flags import flags_in
from utils.runtime.errors import Problem, UserError


def resolve(settings) -> None:
    """Sets `train_args`, which starts the process group where there are several processes.

    Raises:
        UserError: TrainingArguments refuses the values.
    """
    values, recipe = settings.values, settings.recipe
    fields = {field.name for field in dataclasses.fields(recipe) if field.init}
    try:
        train_args = recipe(**{name: values[name] for name in values.keys() & fields})
    except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
        message = f"the recipe's values do not fit together: {error}"
        raise UserError(Problem(message, flags=flags_in(error))) from error
    if values.get("gradient_checkpointing") is None and values.get("activation_checkpointing") is None:
        # TrainingArguments makes them False; None lets the model's size decide when it is loaded
        train_args.gradient_checkpointing = train_args.activation_checkpointing = None
    settings.train_args = train_args
