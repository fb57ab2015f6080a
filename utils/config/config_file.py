"""`--config`: the settings of a run, out of its train_args.json, as if given as flags."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger

from utils.config.flags import fits, type_in_words, what_is_meant
from utils.data.files import TEXT_SUFFIXES, find_files
from utils.runtime.environment import LIBRARIES, hardware, launcher, versions
from utils.runtime.errors import Problem, UserError, nearest
from utils.storage.files import ROOT, project_path, sha256_of
from utils.storage.run_folder import RECORD_FILE, RECORD_IN_PROGRESS
from utils.storage.weights import weights_fingerprint

# of a run, not of its settings: where it went, what it went on from, what it was to replace, whom it was shown to
_LEFT_OUT = ("config", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "local_rank", "push_to_hub")
_CONFIG = ("config",)  # the flag that a problem with the file is about
_RECIPES = ROOT / "train_args"
# run code, send the result away, or replace files: a file from elsewhere must not decide that, so they are typed
_TYPED_ONLY = ("trust_remote_code", "push_to_hub", "overwrite_output_dir")
# the machine's own place for prepared rows, which anyone who wrote the file could have filled with others
_TYPED_ONLY_OF_A_RUN = ("trust_remote_code", "cache_dir")
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
        typed_only: what the file sets and is not taken over, since it must be typed.
    """

    path: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    record: dict = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    typed_only: dict[str, Any] = field(default_factory=dict)

    def recipe(self) -> str | None:
        """The recipe that the file names, which is Python and runs: only one of this project's own.

        A relative path is one below this project, whatever lies in the current folder.

        Raises:
            UserError: it lies elsewhere, by its real path.
        """
        named = self.values.get("train_args_path")
        if named is None and "train_args_path" not in self.values:
            return None
        flag = f"--config {self.path!r}"
        if not isinstance(named, str):
            raise UserError(Problem(f"{flag}: train_args_path is {named!r}; give the path of a recipe", flags=_CONFIG))
        if not is_own_recipe(named):
            message = (
                f"{flag} names the recipe {named!r}, which is Python code outside of {str(_RECIPES)!r}, so it is not "
                f"run. Read it, then give --train_args_path {shlex.quote(named)} as well, or a recipe of this project"
            )
            raise UserError(Problem(message, flags=(*_CONFIG, "train_args_path")))
        file = ROOT / named
        if file.is_file() and Path(project_path(named)).resolve() != file.resolve():
            named = self.values["train_args_path"] = str(file)
        return named

    def apply(self, values: dict, given: set[str], hints: dict[str, list]) -> list[Problem]:
        """Puts the file's settings where no flag was given.

        Args:
            values: every value by name; changed.
            given: the names that were given; those that the file sets to another value than the default are added.
            hints: flag → the types it may have, from `hints_of`.

        Returns:
            the problems: names that are none, values of another type.
        """
        self.given = frozenset(given)
        replaced = {name for group in _ONE_THING if given & set(group) for name in group}
        if given & {"eval_data_path", "val_size"} and not (
            self.values.get("eval_data_path") or self.values.get("val_size")
        ):
            replaced.add("eval_strategy")  # "no" followed from there being nothing to evaluate
        problems = []
        for name, value in self.values.items():
            if name not in hints:
                message = f"--config {self.path!r}: {name!r} is not a flag.{what_is_meant(name, hints)}"
                problems.append(Problem(message, flags=_CONFIG))
            elif not any(fits(value, hint) for hint in hints[name]):
                allowed = " or ".join(dict.fromkeys(type_in_words(hint) for hint in hints[name]))
                message = f"--config {self.path!r}: {name} is {json.dumps(value)}; give {allowed}"
                problems.append(Problem(message, flags=_CONFIG))
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
        """Says in the log what is not taken over, and in what machine, data and libraries differ from the run's."""
        for name, value in self.typed_only.items():
            if name not in self.given:
                flag = f"--{name} {json.dumps(value) if isinstance(value, bool) else shlex.quote(str(value))}"
                logger.warning("--config {}: {} is not taken over; give {} to set it", self.path, name, flag)
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
            now = weights_fingerprint(path)
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


def is_own_recipe(named: str) -> bool:
    """Whether a recipe lies in this project's train_args/ by its real path; a relative path starts at the project."""
    try:
        return (ROOT / Path(named).expanduser()).resolve().is_relative_to(_RECIPES.resolve())
    except (OSError, ValueError, RuntimeError):  # a name that no file can have
        return False


def read_config(path: str | None, flag: str = "config") -> ConfigFile:
    """Reads `--config`: a run's train_args.json, the run's folder, or a JSON object of flags.

    Args:
        path: as given.
        flag: the name of the flag it came by.

    Raises:
        UserError: no such file, or none of that form.
    """
    if path is None:
        return ConfigFile()

    def refused(what: str) -> UserError:
        return UserError(Problem(f"--{flag} {path!r}{what}", flags=(flag,)))

    file = Path(path).expanduser()
    if file.is_dir():
        file = next(
            (file / name for name in (RECORD_FILE, RECORD_IN_PROGRESS) if (file / name).exists()), file / RECORD_FILE
        )
    if not file.is_file():
        siblings = [str(found) for found in file.parent.glob("*")] if file.parent.is_dir() else []
        raise refused(f" is no file ({file}).{nearest(str(file), siblings)} Give a run's train_args.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refused(f" is not JSON ({error}); give a run's train_args.json, or an object of flags") from error
    if not isinstance(content, dict):
        raise refused(" is not a JSON object; give a run's train_args.json, or an object of flags")
    if "common" not in content and "trainer" not in content:
        flags = {name.removeprefix("--"): value for name, value in content.items() if name != "config"}
        return _without_typed_only(ConfigFile(path, flags), _TYPED_ONLY)
    parts = [content.get(name) for name in ("trainer", "common")]
    content = dict.fromkeys(("base", "adapter", "data", "hardware", "start", "versions"), {}) | content
    for name in ("common", "trainer", "base", "adapter", "data", "hardware", "start", "versions"):
        if not isinstance(content.get(name), dict):
            raise refused(f": {name!r} must be an object; give a run's whole train_args.json")
    if not isinstance(content.get("resumed", []), list):
        raise refused(": 'resumed' must be a list; give a run's whole train_args.json")
    left_out = _LEFT_OUT if content["hardware"].get("gpus") else _LEFT_OUT + _OF_THE_CPU
    values = {name: value for part in parts for name, value in part.items() if name not in left_out}
    if values.get("pad_to_multiple_of", 0) is None:
        del values["pad_to_multiple_of"]  # TRL's "auto" has become this, and nothing here takes it
    return _without_typed_only(ConfigFile(path, values, content), _TYPED_ONLY_OF_A_RUN)


def _without_typed_only(config: ConfigFile, names: tuple[str, ...]) -> ConfigFile:
    """Sets aside what must be typed; a value that changes nothing is set aside without a line."""
    found = {name: config.values.pop(name) for name in names if name in config.values}
    config.typed_only = {name: value for name, value in found.items() if value not in (None, False)}
    return config
