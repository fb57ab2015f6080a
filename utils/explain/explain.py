"""Previews a run: its values with their sources, its plan, and the settings without effect."""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from utils.config.deepspeed import short_name
from utils.config.provenance import Source, Sources, unannotated
from utils.data.prepare import Data
from utils.explain.unused import without_effect
from utils.model.layout import expected_layout
from utils.model.meta import ModelSize, model_size, whole_models
from utils.model.options import CHECKPOINTING_FROM, resolve_checkpointing
from utils.model.tokenizer import load_run_tokenizer
from utils.run.record import effective_args
from utils.runtime.errors import UserError
from utils.tasks.no_effect import RunSettings
from utils.template import get_run_template
from utils.train.plan import Rows, extend, measure, plan

_MAX_STREAMED = 5_000_000  # rows; the plan lists the rows of each update

# key of DeepSpeed's file → what transformers fills in for "auto"
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
    """Everything that is known about a run before it starts.

    Attributes:
        values: name → value, all but secrets.
        sources: name → where it comes from.
        no_effect: name → why the setting has no effect here.
        unannotated: what the recipe assigns without a type, which a dataclass ignores: name → file and line.
        plan: from `utils.train.plan.plan`.
        weights: the number of all and of trained weights; None if the model cannot be built without its weights.
        deepspeed: from `deepspeed_values`; empty without DeepSpeed.
    """

    args: Any
    train_args: Any
    data: Data
    values: dict[str, Any]
    sources: dict[str, Source]
    no_effect: dict[str, str]
    unannotated: dict[str, str]
    plan: dict
    weights: ModelSize | None
    deepspeed: dict

    def as_json(self) -> dict:
        """The preview as a JSON object, for other programs."""
        values = {
            name: {"value": value, **_source_as_json(self.sources.get(name)), "idle": self.no_effect.get(name)}
            for name, value in self.values.items()
        }
        return {
            "task": self.args.task_type,
            "plan": {name: _without_steps(part) for name, part in self.plan.items()},
            "weights": self.weights and {"all": self.weights.weights, "trained": self.weights.trained},
            "values": values,
            "deepspeed": self.deepspeed,
            "idle": self.no_effect,
            "unannotated": self.unannotated,
        }


def explain(args, train_args, sources: Sources, processes: int) -> Explained:
    """Prepares the rows as a run would, and plans it; no weights are loaded.

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument.
        sources: from `utils.args.parse_with_sources`.
        processes: how many will train together.

    Raises:
        UserError: rows or tokenizer that a run would refuse.
    """
    task = args.task
    tokenizer = load_run_tokenizer(args)
    template = get_run_template(args, tokenizer) if task.uses_template else None
    data = task.load_datasets(args, train_args, template, tokenizer)
    counted, evaluated = _count(args, train_args), len(data.eval) if data.eval is not None else 0
    _resolve_padding_free(args, train_args, task, tokenizer, sources)
    padded = not task.lays_end_to_end(train_args)
    planned = plan(train_args, _measure(data, task.row_type), evaluated, processes, padded)
    _resolve_checkpointing(counted, train_args, sources)
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


def _measure(data: Data, row_type) -> Rows:
    """Counts the tokens of the training rows; those of a stream are estimated from the first.

    Raises:
        UserError: a stream has too many rows to list.
    """
    rows, count = measure(data.train, row_type), data.rows_in_epoch()
    if data.stream is None:
        return replace(rows, order=None if data.order is None else data.order.indices(0))
    if count > _MAX_STREAMED:
        raise UserError(
            f"--streaming true: the {count:,} rows of --train_data_path are too many to plan, at most "
            f"{_MAX_STREAMED:,}; give some of the files"
        )
    return extend(rows, count)


def _count(args, train_args) -> ModelSize | None:
    """Counts the model's weights; None where they cannot be counted.

    Raises:
        UserError: the model cannot be built, or has no modules of the names given for its adapter.
    """
    with whole_models(train_args):
        try:
            return model_size(args)
        except UserError:
            if args.trust_remote_code:  # its code may need more than shapes
                return None
            raise
        except Exception:  # each model's own code raises its own
            return None


def _resolve_checkpointing(counted: ModelSize | None, train_args, sources: Sources) -> None:
    """Turns gradient checkpointing on for a large model, as loading it will."""
    if counted is not None and resolve_checkpointing(counted.weights, train_args):
        where = f"{counted.weights:,} weights; on from {CHECKPOINTING_FROM:,}"
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            sources[name] = Source("derived", where, sources[name])


def _resolve_padding_free(args, train_args, task, tokenizer, sources: Sources) -> None:
    """Sets `padding_free` as a run will, which tests a small model of the same architecture.

    Raises:
        UserError: no layout that the settings allow is correct for the architecture.
    """
    problem, padding_free, reason = expected_layout(args, train_args, task, tokenizer)
    if problem:
        raise UserError(problem)
    if padding_free != getattr(train_args, "padding_free", False):
        train_args.padding_free = padding_free
        sources["padding_free"] = Source("derived", reason, sources["padding_free"])


def _without_steps(part):
    """A part of the plan without its list of steps."""
    return {name: value for name, value in part.items() if name != "steps"} if isinstance(part, dict) else part


def _source_as_json(source: Source | None) -> dict:
    if source is None:
        return {}
    before = {"before": _source_as_json(source.before)} if source.before else {}
    return {"kind": source.kind, "from": source.where, **before}


def deepspeed_values(train_args, counted: ModelSize | None, steps: int, processes: int) -> dict:
    """Every value of DeepSpeed's file, with `auto` resolved.

    Args:
        train_args: the recipe's TrainArgument.
        counted: from `model_size`; if None, what depends on the model stays `auto`.
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
    resolved = copy.deepcopy(train_args.hf_deepspeed_config)
    if counted is not None:
        try:
            resolved.trainer_config_finalize(train_args, SimpleNamespace(config=counted.config), steps)
        except ValueError as error:
            raise UserError(f"--deepspeed {name} does not fit the flags: {error}") from error
    filled, found = _flat(resolved.config), {}
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
