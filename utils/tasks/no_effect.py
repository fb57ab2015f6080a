"""The table rows with which a task declares settings that have no effect."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from utils.runtime.errors import Problem


@dataclass
class RunSettings:
    """All settings of a run as attributes, by their flags' names.

    Attributes:
        args: CommonArgs.
        train: the recipe's TrainArgument.
        processes: how many processes train together.
        rows_to_evaluate: whether there are validation rows.
    """

    args: Any
    train: Any
    processes: int = 1
    rows_to_evaluate: bool = True

    def __getattr__(self, name: str):
        """Returns a setting, of an enum its value; None if the recipe has no such field."""
        holder = self.args if hasattr(self.args, name) else self.train
        value = getattr(holder, name, None)
        return getattr(value, "value", value)

    @property
    def evaluates(self) -> bool:
        return self.rows_to_evaluate and (self.eval_strategy != "no" or self.eval_on_start)

    def optimizer_takes(self, option: str) -> bool:
        """Whether the optimizer gets an option; true if that depends on the model."""
        from transformers import Trainer

        try:
            return option in Trainer.get_optimizer_cls_and_kwargs(self.train)[1]
        except (ValueError, ImportError):
            return True


@dataclass(frozen=True)
class NoEffect:
    """Settings that have no effect under a condition.

    Attributes:
        names: of the settings.
        when: the condition.
        why: the reason, for `utils.script.explain`.
        refused: setting → the only value that is allowed under the condition; empty if any is.
        flags: further settings that the error concerns, such as the one that would give these an effect.
        remedy: the end of the error message.
    """

    names: tuple[str, ...]
    when: Callable[[RunSettings], Any]
    why: str
    refused: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    remedy: str = "leave it out"


def refuse_without_effect(table: tuple[NoEffect, ...], common, train_args) -> list[Problem]:
    """Returns a problem for each setting that was given a value and has no effect."""
    settings = RunSettings(common, train_args)
    return [
        Problem(
            f"--{name} {_as_flag(getattr(settings, name))} has no effect here ({row.why}); {row.remedy}",
            flags=(name, *row.flags),
        )
        for row in table
        for name, allowed in row.refused.items()
        if getattr(settings, name) != allowed and row.when(settings)
    ]


def _as_flag(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
