"""Records where each value of a run comes from: a default and its line, a flag, a file, or another value."""

import ast
import dataclasses
import functools
import json
import shlex
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from utils.config.deepspeed import short_name
from utils.config.flags import split_flags
from utils.model.source import given_model
from utils.runtime.distributed import started_by_deepspeed
from utils.storage.files import ROOT

_LIBRARIES = {"trl": "TRL's", "transformers": "transformers'"}
_ADAPTER = "adapter_config.json of --adapter_name_or_path {adapter_name_or_path}"
# (step, name) → what a value is derived from; braces hold the values as they are after the step
_REASONS = {
    ("defaults", "precision"): "--precision auto: what this machine computes in",
    ("defaults", "bf16"): "--precision {precision}",
    ("defaults", "fp16"): "--precision {precision}",
    ("defaults", "use_cpu"): "this machine has no GPU",
    ("defaults", "task_type"): "the first task of the recipe {train_args_path}",
    ("defaults", "train_data_path"): "the sample for the task {task_type}",
    ("defaults", "eval_data_path"): "the sample for the task {task_type}",
    ("defaults", "output_dir"): "the task {task_type} and the time",
    ("defaults", "eval_strategy"): "neither --eval_data_path nor --val_size gives rows",
    ("defaults", "max_prompt_length"): "half of --max_len {max_len}, which is less than the default",
    ("defaults", "resume_from_checkpoint"): "the word given",
    ("from_adapter", "model_name_or_path"): _ADAPTER,
    ("from_adapter", "template_name"): "the chat format of the model, or of the run that this one starts from",
    **{("from_adapter", f"lora_{name}"): _ADAPTER for name in ("rank", "alpha", "dropout")},
    **{("from_adapter", f"use_{name}"): _ADAPTER for name in ("dora", "rslora")},
    ("model_path", "train_mode"): "the base {model_name_or_path}, which is saved in 4 bits",
    ("best_model", "load_best_model_at_end"): "--early_stopping_patience {early_stopping_patience} needs it",
    ("best_model", "metric_for_best_model"): "--load_best_model_at_end or --save_strategy best, which need a metric",
    ("best_model", "greater_is_better"): "--metric_for_best_model {metric_for_best_model}",
    **{
        ("best_model", name): "--load_best_model_at_end {load_best_model_at_end} needs it"
        for name in ("eval_strategy", "save_strategy", "eval_steps", "save_steps")
    },
    ("trainer_args", "activation_checkpointing"): "--gradient_checkpointing, its older name",
    ("trainer_args", "activation_checkpointing_kwargs"): "--gradient_checkpointing_kwargs, its older name",
    ("trainer_args", "dataloader_pin_memory"): "--use_cpu {use_cpu}",
    ("trainer_args", "do_eval"): "--eval_strategy {eval_strategy}",
    ("trainer_args", "eval_steps"): "--logging_steps {logging_steps}",
    ("trainer_args", "disable_tqdm"): "the log's level",
    ("output_dir", "resume_from_checkpoint"): "the newest complete checkpoint",
    ("from_adapter", "thinking"): "the run that this one starts from",
    ("output_dir", "template_date"): "the run that is resumed",
}
_OTHERWISE = {
    "defaults": "other values",
    "from_adapter": "the adapter that the run starts from",
    "model_path": "the base model",
    "best_model": "what the evaluation needs",
    "deepspeed": "DeepSpeed's launcher, where --deepspeed is not given",
    "trainer_args": "TrainingArguments, which fills it in",
    "output_dir": "the run's folder",
}
# set by TrainingArguments, or by the machine where the user left a library's default
_AUTOMATIC_STEP = "trainer_args"
_AUTOMATIC_NAMES = ("precision", "bf16", "fp16", "use_cpu")


@dataclass(frozen=True)
class Source:
    """Where a value comes from.

    Attributes:
        kind: `library` (a default of TRL's or transformers'), `default` (of utils/args.py), `recipe`, `flag`,
            `config` (the file of `--config`), `launcher`, or `derived` from other values.
        where: the file and line, the flag as typed, the file and key, or what it is derived from.
        before: of a derived value, where the value that it replaced came from.
        automatic: of a derived value, whether the machine or TrainingArguments alone decides it.
    """

    kind: str
    where: str
    before: "Source | None" = None
    automatic: bool = False

    @property
    def chosen(self) -> bool:
        """Whether a person set it: in a recipe, in a file, or by a flag."""
        return self.kind in ("recipe", "flag", "config")

    @property
    def internal(self) -> bool:
        """Whether nobody set it: a library's default, or what the machine makes of one."""
        return self.kind == "library" or (self.automatic and self.before.kind == "library")


class Sources(dict):
    """name → Source, collected while the arguments are parsed.

    Args:
        *types: the dataclasses whose fields are the flags; of fields with the same name, the last counts.
    """

    def __init__(self, *types: type):
        super().__init__()
        self._values: dict = {}
        for dataclass_type in types:
            for field in dataclasses.fields(dataclass_type):
                self[field.name] = default_source(dataclass_type, field.name)

    def note_flags(self, parser, argv: list[str], values: dict, given: set[str]) -> None:
        """Records the flags that were given, as typed."""
        names = {option: action.dest for action in parser._actions for option in action.option_strings}
        for group in split_flags(argv):
            name = names.get(group[0].partition("=")[0])
            if name in given:
                self[name] = Source("flag", shlex.join(group))
        self._values = dict(values)

    def note_config(self, config, values: dict) -> None:
        """Records what the file of `--config` set."""
        for name in config.values:
            if name in self._values and not same(self._values[name], values[name]):
                part = next((part for part in ("common", "trainer") if name in config.record.get(part, ())), None)
                self[name] = Source("config", f"{config.path}: {f'{part}.' if part else ''}{name}")
        self._values = dict(values)

    def note_step(self, step: str, *holders) -> None:
        """Records the values that a step of parsing has changed.

        Args:
            step: its name, a key of the table of reasons.
            *holders: dicts or objects with the values by name; where several have a name, the last counts.
        """
        now = dict(self._values)
        for holder in holders:
            held = holder if isinstance(holder, dict) else vars(holder)
            now |= {name: held[name] for name in now.keys() & held.keys()}
        if now.get("model_name_or_path"):  # a folder that was converted from what was given is not another value
            now["model_name_or_path"] = given_model(now["model_name_or_path"])
        as_flags = {name: _as_flag(value) for name, value in now.items()}
        for name in self.keys() & now.keys():
            if not same(self._values[name], now[name]):
                text = self._precision(step, name) or _REASONS.get((step, name), _OTHERWISE[step]).format_map(as_flags)
                kind = "launcher" if step == "deepspeed" and started_by_deepspeed() else "derived"
                automatic = step == _AUTOMATIC_STEP or name in _AUTOMATIC_NAMES
                self[name] = Source(kind, text, self[name], automatic)
        self._values = now

    def _precision(self, step: str, name: str) -> str | None:
        """The flag or line that sets the precision by the trainer's `bf16` or `fp16`."""
        found = [self[field].where for field in ("bf16", "fp16") if field in self and self[field].chosen]
        return found[0] if found and (step, name) == ("defaults", "precision") else None


def default_source(dataclass_type: type, name: str) -> Source:
    """Where the default of a field is defined: a file and line, or the class of a library."""
    owner = next(c for c in dataclass_type.__mro__ if name in c.__dict__.get("__annotations__", {}))
    library = _LIBRARIES.get(owner.__module__.partition(".")[0])
    if library:
        return Source("library", f"{library} {owner.__name__}")
    kind = "default" if owner.__module__ == "utils.args" else "recipe"
    return Source(kind, _place(owner, name))


def unannotated(recipe: type) -> dict[str, str]:
    """Fields that a recipe assigns without a type, which a dataclass ignores: name → file and line."""
    fields, found = {field.name for field in dataclasses.fields(recipe)}, {}
    for owner in recipe.__mro__:
        if owner.__module__.partition(".")[0] in (*_LIBRARIES, "builtins"):
            continue
        for name in fields & _lines_of(owner).keys() - owner.__dict__.get("__annotations__", {}).keys():
            found.setdefault(name, _place(owner, name))
    return found


def _place(owner: type, name: str) -> str:
    """`"train_args/sft/base.py:26"`; the class where its file cannot be read."""
    lines = _lines_of(owner)
    if name not in lines:
        return f"{owner.__module__}.{owner.__name__}"
    file = Path(sys.modules[owner.__module__].__file__).resolve()
    return f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}:{lines[name]}"


@functools.cache
def _lines_of(owner: type) -> dict[str, int]:
    """name → the line on which a class assigns it; empty if its file cannot be read."""
    try:
        tree = ast.parse(Path(sys.modules[owner.__module__].__file__).read_bytes())
    except (KeyError, AttributeError, TypeError, OSError, SyntaxError, ValueError):
        return {}
    lines = {}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == owner.__name__):
        for line in node.body:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            lines |= {target.id: line.lineno for target in targets if isinstance(target, ast.Name)}
    return lines


def _as_flag(value) -> str:
    value = value.value if isinstance(value, Enum) else value
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def same(first, second) -> bool:
    """Whether two forms are the same value: `"epoch"` and its enum, `"a"` and `["a"]`, `'{"b": 1}'` and its dict."""
    first, second = _plain(first), _plain(second)
    if isinstance(first, str) and isinstance(second, str):
        return first == second or second.endswith(
            "/" + first.removeprefix("~/")
        )  # resolved from the home folder or the project
    return first == second


def _plain(value):
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(value, list) and len(value) == 1:
        return _plain(value[0])
    if hasattr(value, "to_dict"):
        return value.to_dict()
    value = short_name(value.value if isinstance(value, Enum) else value)
    return None if value == [] or str(value).lower() in ("", "none") else value
