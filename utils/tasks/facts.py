"""What parsing must know of each task before its module is imported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.data.files import SUFFIXES, TEXT_SUFFIXES
from utils.runtime.errors import Problem
from utils.tasks.dpo_checks import check_dpo

# metric of the evaluation → whether greater is better; only these can choose the best checkpoint
_TOKEN_METRICS = {"loss": False, "perplexity": False, "token_accuracy": True}
_PAIR_METRICS = {"loss": False, "rewards/accuracies": True, "rewards/margins": True, "rewards/chosen": True}


def _no_check(common, train_args) -> list[Problem]:
    return []


@dataclass(frozen=True)
class TaskFacts:
    """A task, as parsing needs it.

    Attributes:
        name: the value of `--task_type`.
        sample_data: the training and evaluation rows used where none are given; made for the embedded tiny model.
        metrics: metric of the evaluation, without `eval_` → whether greater is better.
        file_suffixes: of its data files.
        sample_settings: settings of CommonArgs that the sample data needs.
        check: (CommonArgs, TrainArgument) → problems with the recipe's values.
    """

    name: str
    sample_data: tuple[str, str | None]
    metrics: Mapping[str, bool]
    file_suffixes: tuple[str, ...] = SUFFIXES
    sample_settings: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Any, Any], list[Problem]] = _no_check


FACTS = {
    task.name: task
    for task in (
        TaskFacts(
            "pretrain",
            ("data/pretrain_data.jsonl", None),
            _TOKEN_METRICS,
            TEXT_SUFFIXES,
            {"allow_special_tokens_in_content": True},  # some of the sample's texts are chats in the template's format
        ),
        TaskFacts("sft", ("data/sft_data.jsonl", "data/sft_eval_data.jsonl"), _TOKEN_METRICS),
        TaskFacts(
            "dpo_multi", ("data/dpo_multi_data.jsonl", "data/dpo_multi_eval_data.jsonl"), _PAIR_METRICS, check=check_dpo
        ),
        TaskFacts(
            "dpo_single",
            ("data/dpo_single_data.jsonl", "data/dpo_single_eval_data.jsonl"),
            _PAIR_METRICS,
            check=check_dpo,
        ),
    )
}
