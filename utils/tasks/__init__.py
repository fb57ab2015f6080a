"""The tasks: one module each, loaded only when it is run.

A task module has

- `USES_TEMPLATE`: whether its rows are conversations
- `load_datasets(args, train_args, template, tokenizer) -> Data`
- `build_collator(args, train_args, tokenizer) -> collator`
- `build_trainer(args, train_args, model, adapter, data, collator, tokenizer) -> Trainer`
"""

import importlib

TASKS = {
    "pretrain": "utils.tasks.pretrain",
    "sft": "utils.tasks.sft",
    "dpo_multi": "utils.tasks.dpo_multi",
    "dpo_single": "utils.tasks.dpo_single",
}


def get_task(name: str):
    """Imports the task's module."""
    return importlib.import_module(TASKS[name])
