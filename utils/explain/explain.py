"""What a run will do, before it does it: its values with their sources, its plan, and what has no effect."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from utils.config.deepspeed import short_name
from utils.config.provenance import Source, Sources, unannotated
from utils.explain.unused import without_effect
from utils.model.layout import expected_layout
from utils.model.meta import weights
from utils.model.options import CHECKPOINTING_FROM, resolve_checkpointing
from utils.model.tokenizer import tokenizer_of
from utils.run.record import effective_args
from utils.runtime.errors import UserError
from utils.tasks.no_effect import RunSettings
from utils.tasks.trainer import Data
from utils.template import get_template
from utils.train.plan import measure, plan

# what DeepSpeed's "auto" stands for, as transformers fills it in
_AUTO = {
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "train_batch_size": "--per_device_train_batch_size × --gradient_accumulation_steps × processes",
    "gradient_clipping": "--max_grad_norm",
    "bf16.enabled": "--precision",
    "fp16.enabled": "--precision",
    "zero_optimization.reduce_bucket_size": "the model's hidden size, squared",
    "zero_optimization.stage3_prefetch_bucket_size": "0.9 × the model's hidden size, squared",
    "zero_optimization.stage3_param_persistence_threshold": "10 × the model's hidden size",
}


@dataclass
class Explained:
    """Everything that can be said of a run before it begins.

    Attributes:
        values: name → value, every one of them but secrets.
        sources: name → where it comes from.
        idle: name → why it does nothing here.
        unannotated: what the recipe assigns without a type, which a dataclass ignores: name → file and line.
        plan: from `utils.train.plan.plan`.
        weights: how many there are and are trained; None where that can't be told.
        deepspeed: from `deepspeed_values`; empty without DeepSpeed.
    """

    args: Any
    train_args: Any
    data: Data
    values: dict[str, Any]
    sources: dict[str, Source]
    idle: dict[str, str]
    unannotated: dict[str, str]
    plan: dict
    weights: dict | None
    deepspeed: dict

    def as_json(self) -> dict:
        """The same as an object for other programs."""
        values = {
            name: {"value": value, **_source_as_json(self.sources.get(name)), "idle": self.idle.get(name)}
            for name, value in self.values.items()
        }
        return {
            "task": self.args.task_type,
            "plan": {name: _without_list(part) for name, part in self.plan.items()},
            "weights": self.weights and {name: self.weights[name] for name in ("all", "trained")},
            "values": values,
            "deepspeed": self.deepspeed,
            "idle": self.idle,
            "unannotated": self.unannotated,
        }


def explain(args, train_args, sources: Sources, processes: int) -> Explained:
    """Prepares the rows, as a run would, and says what it will do; no weights are loaded.

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument.
        sources: from `utils.args.parse_with_sources`.
        processes: how many will train together.

    Raises:
        UserError: rows or tokenizer that a run would refuse.
    """
    task = args.task
    tokenizer = tokenizer_of(args)
    template = get_template(args.template_name, tokenizer, args.template_date) if task.uses_template else None
    data = task.load_datasets(args, train_args, template, tokenizer)
    counted, evaluated = weights(args, train_args), len(data.eval) if data.eval is not None else 0
    _expect_layout(args, train_args, task, tokenizer, sources)
    padded = not task.lays_end_to_end(train_args)
    planned = plan(train_args, measure(data.train, task.row_type), evaluated, processes, padded)
    if counted is not None and resolve_checkpointing(counted["all"], train_args):
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            where = f"{counted['all']:,} weights; on from {CHECKPOINTING_FROM:,}"
            sources[name] = Source("derived", where, sources[name])
    case = RunSettings(args, train_args, processes, rows_to_evaluate=evaluated > 0)
    settings = effective_args(args, train_args)
    values = json.loads(json.dumps(settings["trainer"] | settings["common"], default=str))
    return Explained(
        args,
        train_args,
        data,
        values,
        {name: source for name, source in sources.items() if name in values},
        {name: why for name, why in without_effect(case).items() if name in values},
        unannotated(type(train_args)),
        planned,
        counted,
        deepspeed_values(train_args, counted, planned["steps"], processes),
    )


def _expect_layout(args, train_args, task, tokenizer, sources: Sources) -> None:
    """Sets `padding_free` as a run will, by a small model of the same architecture.

    Raises:
        UserError: no layout that the settings allow is right for it.
    """
    problem, padding_free, reason = expected_layout(args, train_args, task, tokenizer)
    if problem:
        raise UserError(problem)
    if padding_free != getattr(train_args, "padding_free", False):
        train_args.padding_free = padding_free
        sources["padding_free"] = Source("derived", reason, sources["padding_free"])


def _without_list(part):
    """When a run evaluates, say, without the list of every step of it."""
    return {name: value for name, value in part.items() if name != "steps"} if isinstance(part, dict) else part


def _source_as_json(source: Source | None) -> dict:
    if source is None:
        return {}
    before = {"before": _source_as_json(source.before)} if source.before else {}
    return {"kind": source.kind, "from": source.where, **before}


def deepspeed_values(train_args, counted: dict | None, steps: int, processes: int) -> dict:
    """Every value that DeepSpeed's file sets, `auto` as what it becomes.

    Args:
        train_args: the recipe's TrainArgument.
        counted: from `weights`; without it what depends on the model stays `auto`.
        steps: of the run.
        processes: how many train together.

    Returns:
        `{"file": "zero2", "values": {"zero_optimization.stage": {"value": 2, "from": "zero2"}}}`, empty without a file.
    """
    given = train_args.deepspeed
    if not given:
        return {}
    name = "--deepspeed"
    if not isinstance(given, dict):
        name = short_name(given)
        given = json.loads(given if given.lstrip().startswith("{") else Path(given).expanduser().read_bytes())
    settled = copy.deepcopy(train_args.hf_deepspeed_config)
    if counted is not None:
        try:
            settled.trainer_config_finalize(train_args, SimpleNamespace(config=counted["config"]), steps)
        except ValueError as error:
            raise UserError(f"--deepspeed {name} does not go with the flags: {error}") from error
    filled, found = _flat(settled.config), {}
    for key, value in _flat(given).items():
        now, where = filled.get(key, value), name
        if value == "auto":
            where = f'{name}, "auto": {_AUTO.get(key, "DeepSpeed decides")}'
            if key == "train_batch_size":
                now = train_args.per_device_train_batch_size * train_args.gradient_accumulation_steps * processes
        found[key] = {"value": now, "from": where}
    return {"file": name, "values": found}


def _flat(tree: dict, prefix: str = "") -> dict:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`"""
    found = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
