"""Task: everything that other code needs to know about a task.

No code outside `utils/tasks` compares a task's name or names a column of its rows. A new task consists of

1. a file in `utils/tasks/`, such as `sft.py`, that ends with `TASK = Task(...)`. Torch and TRL are imported inside
   its functions, so that `--help` and the checks of the arguments do not import them.
2. a recipe `train_args/<task>/base.py`: a dataclass `TrainArgument` that extends transformers' `TrainingArguments` or
   one of TRL's configs, with `task_types = ("<task>",)`.
3. a row of the table `MODULES` in `utils/tasks/__init__.py`.
4. a test. `tests/tasks/test_added_task.py` adds a task with a row type of its own, and runs every command with it.

Rows that are neither conversations, preference pairs nor texts need a `RowType` (`utils/data/row_type.py`) as well.

Not supported yet: flags for a second model, such as a teacher or a reward model (a task's trainer can load one itself;
checkpoints hold only what is trained), and data files other than `--train_data_path` and `--eval_data_path`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from utils.data.files import SUFFIXES
from utils.data.row_type import RowType
from utils.runtime.errors import Problem
from utils.tasks.no_effect import NoEffect


def no_collator(args, train_args, tokenizer) -> Callable:
    """The `build_collator` of a task whose trainer takes the list of prepared rows."""
    return list


def no_problems(common, train_args) -> list[Problem]:
    """The `check` of a task without checks of its own."""
    return []


@dataclass(frozen=True)
class Task:
    """A training task.

    Attributes:
        name: of `--task_type`.
        family: a tag of the model card, shared by the modes of one method; the name by default.
        row_type: of its rows.
        load_datasets: (args, train_args, template or None, tokenizer) → `utils.data.prepare.Data`. The decorator
            `utils.data.load_sources.loads_sources` extends it to mixtures and `--curriculum`.
        build_trainer: (args, train_args, model, adapter, data, collator, tokenizer) → transformers' Trainer.
        build_collator: (args, train_args, tokenizer) → function of prepared rows to the tensors of a step. By default
            the trainer's step gets the list of prepared rows.

        file_suffixes: the kinds of files its rows are read from.
        sample_data: the files used when no data is given: for training and for evaluation, each may be None.
        sample_settings: common arguments that the sample needs, unless they are given.

        metrics: metric of the evaluation that `--metric_for_best_model` may name, without `eval_` → whether greater is
            better.
        usual_learning_rates: whether an adapter is trained → the lowest and highest usual rate of AdamW.

        uses_template: whether rows are rendered in a chat format.
        auto_class: transformers' class that loads the model.
        peft_task_type: a name of `peft.TaskType`.
        needs_reference: whether the loss needs a frozen copy of the starting model.
        supports_packing: whether `--packing true` puts several rows into one.
        supports_padding_free: whether the collator can concatenate the rows of a step (`--padding_free true`).
        packing_splits_rows: whether packing may split a row of the files.
        notes_row_losses: whether its trainer notes the loss of each row, as `--row_ledger true` needs.
        imitates: whether training makes the labelled tokens likely, so that an overfitted model repeats its rows.

        settings_without_effect: of this task; those of every task are in `utils/explain/unused.py`.
        check: (common, train_args) → problems with the recipe's values.
        memory_loss: (model, hidden states and targets of the labelled positions, batch) → the loss, as
            `utils.script.plan_memory` runs it without weights. None: full logits in float32.
        plain_loss: (trainer, prepared rows) → the loss in plain PyTorch, which `utils.script.prove` compares with, or
            None for settings it does not support.
    """

    name: str
    row_type: RowType
    load_datasets: Callable
    build_trainer: Callable
    build_collator: Callable = no_collator
    family: str = ""

    file_suffixes: tuple[str, ...] = SUFFIXES
    sample_data: tuple[str | None, str | None] = (None, None)
    sample_settings: dict[str, Any] = field(default_factory=dict)

    metrics: dict[str, bool] = field(default_factory=lambda: {"loss": False})
    usual_learning_rates: dict[bool, tuple[float, float]] = field(default_factory=dict)

    uses_template: bool = True
    auto_class: str = "AutoModelForCausalLM"
    peft_task_type: str = "CAUSAL_LM"
    needs_reference: bool = False
    supports_packing: bool = False
    supports_padding_free: bool = False
    packing_splits_rows: bool = False
    notes_row_losses: bool = False
    imitates: bool = False

    settings_without_effect: tuple[NoEffect, ...] = ()
    check: Callable[[Any, Any], list[Problem]] = no_problems
    memory_loss: Callable | None = None
    plain_loss: Callable | None = None

    def __post_init__(self):
        object.__setattr__(self, "family", self.family or self.name)

    def lays_end_to_end(self, train_args) -> bool:
        """Whether the rows of a step are concatenated, rather than padded."""
        return self.supports_padding_free and bool(getattr(train_args, "padding_free", False))

    def packs(self, train_args) -> bool:
        """Whether several rows are packed into one."""
        return self.supports_packing and bool(getattr(train_args, "packing", False))
