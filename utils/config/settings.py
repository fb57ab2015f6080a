"""The arguments while they are being resolved and validated."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.runtime.errors import Problem


@dataclass
class Settings:
    """What the steps of parsing read and fill in; `utils/config/parse.py` has their order.

    A step's `resolve(settings)` changes `common`, `values` or `train_args`; its `validate(settings)` changes nothing.

    Attributes:
        common: CommonArgs.
        values: name → value of the recipe's fields, from which `train_args` is built.
        requested: name → value of every flag as it was before the first step: typed, of `--config`, or a default.
        given: the names that a flag or the file of `--config` sets.
        recipe: the class TrainArgument.
        tasks: name → Task, every task there is.
        task: the Task of `--task_type`; None until the step `defaults` has set it, and for an unknown name.
        needs_weights: whether the base must have weights beside its config.json.
        train_args: the recipe's TrainArgument; None until the step `train_args` has built it.
        adapter: the adapter_config.json of `--adapter_name_or_path`, and why it cannot be used.
    """

    common: Any
    values: dict[str, Any]
    requested: Mapping[str, Any]
    given: frozenset[str]
    recipe: type
    tasks: Mapping[str, Any]
    needs_weights: bool = True
    task: Any = None
    train_args: Any = None
    adapter: tuple[dict, list[Problem]] = field(default_factory=lambda: ({}, []))
