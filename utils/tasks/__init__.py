"""Training tasks, one file each, and the table that maps their names to them.

In reading order: task, no_effect, sft, pretrain, dpo, dpo_checks, dpo_trainer, dpo_multi,
dpo_single, plain_loss, trainer.
"""

import importlib
from collections.abc import Iterator, Mapping

from utils.tasks.task import Task

# name of a task → the module that ends with its TASK; a new task is a row here
MODULES = {
    "pretrain": "utils.tasks.pretrain",
    "sft": "utils.tasks.sft",
    "dpo_multi": "utils.tasks.dpo_multi",
    "dpo_single": "utils.tasks.dpo_single",
}


class _Tasks(Mapping[str, Task]):
    """Every task by its name; the module of a task is imported when the task is looked up."""

    def __getitem__(self, name: str) -> Task:
        return importlib.import_module(MODULES[name]).TASK

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


TASKS = _Tasks()


def get_task(name: str) -> Task:
    """Returns the task with a name, as `TASKS[name]`."""
    return TASKS[name]
