"""`--config`: the settings of a run, out of its train_args.json, as if given as flags."""

import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from loguru import logger

from utils.checkpoints import BEGUN, FINISHED
from utils.data_files import TEXT_SUFFIXES, find_files
from utils.errors import UserError, nearest
from utils.record import LIBRARIES, hardware, launcher, sha256_of, versions
from utils.weight_files import fingerprint

# of a run, not of its settings: where it went, what it went on from, what it was to replace, whom it was shown to
_LEFT_OUT = ("config", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "local_rank", "push_to_hub")
# follow from the machine where it has no GPU
_OF_THE_CPU = ("use_cpu", "dataloader_pin_memory")
# several names of one thing: one of them on the command line replaces all of the file's
_ONE_THING = (
    ("precision", "bf16", "fp16"),
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
    ("num_train_epochs", "max_steps"),
    ("eval_data_path", "val_size"),
)
# what a default stands for depends on other values, so that these count as given also where they are the default
_ALWAYS_GIVEN = {"template_name": ("adapter_name_or_path", "model_name_or_path"), "max_prompt_length": ("max_len",)}


@dataclass
class ConfigFile:
    """The settings that `--config` names; empty without it.

    Attributes:
        path: the file.
        values: flag → value.
        record: everything the run noted of itself; empty for a plain list of flags.
        given: the flags of the command line, which replace the file's.
    """

    path: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    record: dict = field(default_factory=dict)
    given: frozenset[str] = frozenset()

    def apply(self, values: dict, given: set[str], types: tuple[type, ...]) -> list[str]:
        """Puts the file's settings where no flag was given.

        Args:
            values: every value by name; changed.
            given: the names that were given; those that the file sets to another value than the default are added.
            types: the dataclasses whose fields are the flags.

        Returns:
            the problems: names that are none, values of another type.
        """
        hints = _hints(types)
        self.given = frozenset(given)
        replaced = {name for group in _ONE_THING if given & set(group) for name in group}
        if given & {"eval_data_path", "val_size"} and not (
            self.values.get("eval_data_path") or self.values.get("val_size")
        ):
            replaced.add("eval_strategy")  # "no" followed from there being nothing to evaluate
        problems = []
        for name, value in self.values.items():
            if name not in hints:
                problems.append(f"--config {self.path!r}: {name!r} is not a flag.{nearest(name, hints)}")
            elif not any(_fits(value, hint) for hint in hints[name]):
                allowed = " or ".join(dict.fromkeys(_say(hint) for hint in hints[name]))
                problems.append(f"--config {self.path!r}: {name} is {json.dumps(value)}; give {allowed}")
            elif name not in given and name not in replaced:
                on_top = not given & set(_ALWAYS_GIVEN.get(name, (name,)))
                if values.get(name) != value or (name in _ALWAYS_GIVEN and on_top):
                    self._give(name, value, values, given)
        return problems

    def _give(self, name: str, value, values: dict, given: set[str]) -> None:
        values[name] = value
        if not (self.record and name in ("bf16", "fp16")):  # of a run, these follow from `precision`
            given.add(name)

    def warn(self, common) -> None:
        """Says in the log in what this machine, its data and its libraries differ from those of the run."""
        if not self.record:
            return
        changed = sorted({name for one in self.record.get("resumed") or [] for name in one["changed"]})
        resumed = [f"it was resumed with another {', '.join(changed)}; only the last is repeated"] if changed else []
        for text in [*resumed, *self._other_machine(), *self._other_data(common)]:
            logger.warning("--config {}: {}; the losses may differ", self.path, text)

    def _other_machine(self) -> list[str]:
        then = self.record["versions"]
        now = versions()
        found = [
            f"{name} was {then[name]}, is {now[name]}" for name in LIBRARIES if then.get(name, now[name]) != now[name]
        ]
        machine, here = self.record["hardware"], hardware()
        for name in ("cpu", "gpus"):
            if machine.get(name, here[name]) != here[name]:
                found.append(f"{name} was {machine[name] or 'none'}, is {here[name] or 'none'}")
        count, processes = self.record["start"].get("processes"), launcher()["processes"]
        if count not in (None, processes):
            found.append(f"it had {count} processes, now {processes}, so a step has other rows")
        return found

    def _other_data(self, common) -> list[str]:
        found = []
        for part, name in (("base", "model_name_or_path"), ("adapter", "adapter_name_or_path")):
            then, path = self.record[part].get("fingerprint"), getattr(common, name)
            if name in self.given or not then or not path:
                continue
            now = fingerprint(path)
            if now not in (None, then):
                found.append(f"the {part} {path!r} had the weights {then}, has {now}")
        for part in ("train", "eval"):
            name = f"{part}_data_path"
            then = {entry["file"]: entry["sha256"] for entry in self._files(part)}
            if name in self.given or not then or not getattr(common, name):
                continue
            files = find_files(getattr(common, name), f"--{name}", TEXT_SUFFIXES)[0]
            now = {file: sha256_of(file) for file in files}
            for file, sha in now.items():
                if file in then and then[file] != sha:
                    found.append(f"{file!r} has changed since (sha256 {then[file][:12]} then, {sha[:12]} now)")
                elif sha not in then.values():
                    found.append(f"{file!r} was not among the rows then")
            found += [
                f"{file!r} is not there any more"
                for file, sha in then.items()
                if file not in now and sha not in now.values()
            ]
        return found

    def _files(self, part: str) -> list[dict]:
        return (self.record["data"].get(part) or {}).get("files") or []


def read_config(path: str | None) -> ConfigFile:
    """Reads `--config`: a run's train_args.json, the run's folder, or a JSON object of flags.

    Raises:
        UserError: no such file, or none of that form.
    """
    if path is None:
        return ConfigFile()
    file = Path(path).expanduser()
    if file.is_dir():
        file = next((file / name for name in (FINISHED, BEGUN) if (file / name).exists()), file / FINISHED)
    flag = f"--config {path!r}"
    if not file.is_file():
        siblings = [str(found) for found in file.parent.glob("*")] if file.parent.is_dir() else []
        raise UserError(f"{flag} is no file ({file}).{nearest(str(file), siblings)} Give a run's train_args.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} is not JSON ({error}); give a run's train_args.json, or an object of flags") from error
    if not isinstance(content, dict):
        raise UserError(f"{flag} is not a JSON object; give a run's train_args.json, or an object of flags")
    if "common" not in content and "trainer" not in content:
        return ConfigFile(path, {name.removeprefix("--"): value for name, value in content.items() if name != "config"})
    parts = [content.get(name) for name in ("trainer", "common")]
    content = dict.fromkeys(("base", "adapter", "data", "hardware", "start", "versions"), {}) | content
    for name in ("common", "trainer", "base", "adapter", "data", "hardware", "start", "versions"):
        if not isinstance(content.get(name), dict):
            raise UserError(f"{flag}: {name!r} must be an object; give a run's whole train_args.json")
    if not isinstance(content.get("resumed", []), list):
        raise UserError(f"{flag}: 'resumed' must be a list; give a run's whole train_args.json")
    left_out = _LEFT_OUT if content["hardware"].get("gpus") else _LEFT_OUT + _OF_THE_CPU
    values = {name: value for part in parts for name, value in part.items() if name not in left_out}
    if values.get("pad_to_multiple_of", 0) is None:
        del values["pad_to_multiple_of"]  # TRL's "auto" has become this, and nothing here takes it
    return ConfigFile(path, values, content)


def _hints(types: tuple[type, ...]) -> dict[str, list]:
    """What each flag may be: a recipe says `str` of a field that its parent also takes as a list."""
    found: dict[str, list] = {}
    for dataclass_type in types:
        for parent in dataclass_type.__mro__:
            if hasattr(parent, "__dataclass_fields__"):
                hints = get_type_hints(parent)
                for name in parent.__dataclass_fields__.keys() & hints.keys():
                    found.setdefault(name, []).append(hints[name])
    return found


def _fits(value, hint) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if isinstance(origin or hint, type) and issubclass(origin or hint, Enum):
        return value in [one.value for one in hint]
    return hint is Any or (isinstance(origin or hint, type) and isinstance(value, origin or hint))


def _say(hint) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_say(one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(one.value) for one in hint)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint) or {list: "a list", dict: "an object"}.get(get_origin(hint) or hint, str(hint))
