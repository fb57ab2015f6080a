"""`--config`: reads the settings of a run from its train_args.json, as if they were given as flags."""

import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger

from utils.config.flags import fits, suggest_flag, type_in_words
from utils.data.files import TEXT_SUFFIXES, find_files
from utils.data.sources import plain_paths, read_sources
from utils.data.stream_index import fingerprint
from utils.runtime.environment import LIBRARIES, hardware, launcher, versions
from utils.runtime.errors import Problem, UserError, nearest_path
from utils.storage.files import ROOT, project_path, sha256_of
from utils.storage.run_folder import RECORD_FILE, RECORD_IN_PROGRESS
from utils.storage.weights import weights_fingerprint

# about that run alone: its folder, its checkpoint, what it replaced, where it was published
_LEFT_OUT = ("config", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "local_rank", "push_to_hub")
_CONFIG = ("config",)  # the flag that a problem with the file is about
_RECIPES = ROOT / "train_args"
# run code, publish the result or replace files: a file from elsewhere must not decide that
_TYPED_ONLY = ("trust_remote_code", "push_to_hub", "overwrite_output_dir")
# whoever wrote the file could have filled its cache_dir with other rows
_TYPED_ONLY_OF_A_RUN = ("trust_remote_code", "cache_dir")
# set automatically on a machine without a GPU
_CPU_ONLY = ("use_cpu", "dataloader_pin_memory")
# settings of the same thing: one of them on the command line replaces all of the file's
_SAME_SETTING = (
    ("precision", "bf16", "fp16"),
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
    ("num_train_epochs", "max_steps"),
    ("eval_data_path", "val_size"),
)
# these count as given even at their default, because the default depends on the flags listed
_MODEL = ("adapter_name_or_path", "model_name_or_path")
_ALWAYS_GIVEN = {"template_name": _MODEL, "thinking": _MODEL, "max_prompt_length": ("max_len",)}


@dataclass
class ConfigFile:
    """The settings that `--config` names; empty without it.

    Attributes:
        path: the file.
        values: flag → value.
        record: the run's record, all of train_args.json; empty for a plain object of flags.
        given: the flags of the command line, which replace the file's.
        typed_only: settings of the file that are ignored, because they must be given on the command line.
    """

    path: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    record: dict = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    typed_only: dict[str, Any] = field(default_factory=dict)

    def recipe(self) -> str | None:
        """The recipe that the file names. It is Python code that is run, so it must be in this project's train_args/.

        A relative path starts at the project's root, not at the current folder.

        Raises:
            UserError: its real path is elsewhere.
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
        """Takes the file's settings where no flag was given.

        Args:
            values: every value by name; changed.
            given: the names that were given; those that the file sets to other than their default are added.
            hints: flag → the types it may have, from `hints_of`.

        Returns:
            the problems: unknown names, values of the wrong type.
        """
        self.given = frozenset(given)
        replaced = {name for group in _SAME_SETTING if given & set(group) for name in group}
        if given & {"eval_data_path", "val_size"} and not (
            self.values.get("eval_data_path") or self.values.get("val_size")
        ):
            replaced.add("eval_strategy")  # it was "no" because the run had no evaluation rows
        problems = []
        for name, value in self.values.items():
            if name not in hints:
                message = f"--config {self.path!r}: {name!r} is not a flag.{suggest_flag(name, hints)}"
                problems.append(Problem(message, flags=_CONFIG))
            elif not any(fits(value, hint) for hint in hints[name]):
                allowed = " or ".join(dict.fromkeys(type_in_words(hint) for hint in hints[name]))
                message = f"--config {self.path!r}: {name} is {json.dumps(value)}; give {allowed}"
                problems.append(Problem(message, flags=_CONFIG))
            elif name not in given and name not in replaced:
                depends_on_file = not given & set(_ALWAYS_GIVEN.get(name, (name,)))
                if values.get(name) != value or (name in _ALWAYS_GIVEN and depends_on_file):
                    self._give(name, value, values, given)
        return problems

    def _give(self, name: str, value, values: dict, given: set[str]) -> None:
        values[name] = value
        if not (self.record and name in ("bf16", "fp16")):  # in a run's record they follow from `precision`
            given.add(name)

    def warn(self, common) -> None:
        """Logs which settings are ignored, and how machine, data and libraries differ from the run's."""
        for name, value in self.typed_only.items():
            if name not in self.given:
                flag = f"--{name} {json.dumps(value) if isinstance(value, bool) else shlex.quote(str(value))}"
                logger.warning("--config {}: {} is ignored; give {} to set it", self.path, name, flag)
        if not self.record:
            return
        changed = sorted({name for resume in self.record.get("resumed") or [] for name in resume["changed"]})
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
            found.append(f"it had {count} processes, now {processes}, so a step has different rows")
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
            path = getattr(common, f"{part}_data_path")
            if f"{part}_data_path" not in self.given and path:
                found += self._other_files(part, path)
        return found

    def _other_files(self, part: str, path: str) -> list[str]:
        """How the data files of `train` or `eval` differ from those of the run."""
        streamed = any("fingerprint" in entry for entry in self._files(part))
        name, checksum = ("fingerprint", fingerprint) if streamed else ("sha256", sha256_of)
        then = {entry["file"]: entry[name] for entry in self._files(part)}
        if not then:
            return []
        found = []
        if part == "train":
            known = self.record["data"]["train"].get("sources")
            if known is not None and known != [asdict(source) for source in read_sources(path)[0]]:
                found.append(f"the sources that {path!r} lists have changed since")
            path = plain_paths(path)
        now = {file: checksum(file) for file in find_files(path, f"--{part}_data_path", TEXT_SUFFIXES)[0]}
        for file, sha in now.items():
            if file in then and then[file] != sha:
                found.append(f"{file!r} has changed since ({name} {then[file][:12]} then, {sha[:12]} now)")
            elif sha not in then.values():
                found.append(f"{file!r} was not part of the data then")
        return found + [
            f"{file!r} no longer exists" for file, sha in then.items() if file not in now and sha not in now.values()
        ]

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
    content = _read_object(path, flag)
    if "common" not in content and "trainer" not in content:
        flags = {name.removeprefix("--"): value for name, value in content.items() if name != "config"}
        return _without_typed_only(ConfigFile(path, flags), _TYPED_ONLY)
    content = dict.fromkeys(("base", "adapter", "data", "hardware", "start", "versions"), {}) | content
    for name in ("common", "trainer", "base", "adapter", "data", "hardware", "start", "versions"):
        if not isinstance(content.get(name), dict):
            raise _unusable(path, flag, f": {name!r} must be an object; give a run's unchanged train_args.json")
    if not isinstance(content.get("resumed", []), list):
        raise _unusable(path, flag, ": 'resumed' must be a list; give a run's unchanged train_args.json")
    left_out = _LEFT_OUT if content["hardware"].get("gpus") else _LEFT_OUT + _CPU_ONLY
    settings = content["trainer"] | content["common"]
    values = {name: value for name, value in settings.items() if name not in left_out}
    if values.get("pad_to_multiple_of", 0) is None:
        del values["pad_to_multiple_of"]  # what TRL makes of its default "auto"; as a flag it would be refused
    return _without_typed_only(ConfigFile(path, values, content), _TYPED_ONLY_OF_A_RUN)


def _read_object(path: str, flag: str) -> dict:
    """The JSON object in a file, or in the record of a run's folder."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = next(
            (file / name for name in (RECORD_FILE, RECORD_IN_PROGRESS) if (file / name).exists()), file / RECORD_FILE
        )
    if not file.is_file():
        siblings = file.parent.glob("*") if file.parent.is_dir() else []
        message = f" is not a file ({file}).{nearest_path(str(file), siblings)} Give a run's train_args.json"
        raise _unusable(path, flag, message)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f" is not JSON ({error}); give a run's train_args.json, or an object of flags"
        raise _unusable(path, flag, message) from error
    if not isinstance(content, dict):
        raise _unusable(path, flag, " is not a JSON object; give a run's train_args.json, or an object of flags")
    return content


def _unusable(path: str, flag: str, what: str) -> UserError:
    return UserError(Problem(f"--{flag} {path!r}{what}", flags=(flag,)))


def _without_typed_only(config: ConfigFile, names: tuple[str, ...]) -> ConfigFile:
    """Moves settings that must be given on the command line to `typed_only`; those that are off are dropped."""
    found = {name: config.values.pop(name) for name in names if name in config.values}
    config.typed_only = {name: value for name, value in found.items() if value not in (None, False)}
    return config
