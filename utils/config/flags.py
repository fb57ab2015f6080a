"""Command-line flags from dataclasses; every flag is read before problems are reported."""

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import field, fields
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from utils.runtime.errors import Problem, nearest, refusal


def arg(default, help: str):
    """A dataclass field with a default and its help text."""
    return field(default=default, metadata={"help": help})


class _FlagError(Exception):
    """Raised instead of argparse's exit, so that all flags are read before problems are reported."""


def make_parser(dataclass_types: list[type], prog: str, description: str):
    """An HfArgumentParser whose errors are raised rather than printed one at a time."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):
            raise _FlagError(message)

    return Parser(
        dataclass_types,
        prog=prog,
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
        conflict_handler="resolve",
    )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and keeps the description's line breaks."""


def split_flags(argv: list[str]) -> list[list[str]]:
    """`["--a", "1", "2", "--b"]` → `[["--a", "1", "2"], ["--b"]]`"""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


def value_of(argv: list[str], flag: str) -> str | None:
    """The last value given for a flag, before there is a parser; None where it was not given."""
    found = None
    for group in split_flags(argv):
        if group[0].startswith("--") and flag_of(group) == flag:
            found = group[0].partition("=")[2] or (group[1] if len(group) > 1 else "")
    return found


def flag_of(group: list[str]) -> str:
    """The name of the flag that a group of `split_flags` gives: `["--lora-rank=8"]` → `"lora_rank"`."""
    return group[0].partition("=")[0].removeprefix("--").replace("-", "_")


def flags_in(error: Exception) -> tuple[str, ...]:
    """The flags that another library's error names; they are nowhere but in its text.

    transformers 5.x, when a recipe's values do not fit together (`TrainingArguments.__post_init__`):
    `"--load_best_model_at_end requires the save and eval strategy to match, …"`.
    """
    return tuple(re.findall(r"--(\w+)", str(error)))


def split_own(argv: list[str] | None, own: type) -> tuple[list[str], list[str]]:
    """Separates a command's own flags from those of main_train.py, which it takes as well.

    Args:
        argv: the flags; the command line's by default.
        own: the dataclass with the command's own.

    Returns:
        the command's own, `--help` among them; the rest.
    """
    names = {f"--{field.name}" for field in fields(own)} | {"--help", "-h"}
    groups = split_flags(list(sys.argv[1:] if argv is None else argv))
    mine = [word for group in groups if group[0].split("=")[0] in names for word in group]
    rest = [word for group in groups if group[0].split("=")[0] not in names for word in group]
    return mine, rest


def read_flags(parser, argv: list[str] | None = None) -> tuple[dict, set[str], list[Problem]]:
    """Parses each flag by itself, so that one wrong flag does not hide the next.

    Args:
        parser: from `make_parser`.
        argv: the flags; the command line's by default.

    Returns:
        every value by name, the names that were given, the problems.
    """
    argv = sys.argv[1:] if argv is None else argv
    namespace, problems, given = argparse.Namespace(), [], set()
    options = {option: action for action in parser._actions for option in action.option_strings}
    known = [option for option in options if "_" in option or "-" not in option[2:]]
    parser.parse_known_args([], namespace)
    for group in split_flags(argv):
        name = group[0].split("=")[0]
        flags = [flag_of(group)] if name.startswith("--") else []
        try:
            _, unknown = parser.parse_known_args(group, namespace)
        except (_FlagError, argparse.ArgumentError, argparse.ArgumentTypeError, ValueError) as error:
            problems += refusal(f"{name}: {_flag_reason(error, options.get(name), group)}", *flags)
            continue
        if name not in options:
            unknown_flag = name if name.startswith("--") else " ".join(group)
            wanted = suggest_flag(name.replace("-", "_").replace("__", "--", 1), known)
            problems += refusal(f"{unknown_flag} is not a flag.{wanted} See --help for all", *flags)
        elif unknown:
            problems += refusal(f"{name} does not take {' '.join(unknown)!r}", *flags)
        else:
            given.add(options[name].dest)
    return vars(namespace), given, problems


# flags of older versions of transformers → their replacement
_RENAMED = {"group_by_length": "train_sampling_strategy group_by_length"}


def suggest_flag(name: str, known: Iterable[str]) -> str:
    """Suggests a flag for an unknown one, as a sentence after a space; an empty text where none is similar.

    `suggest_flag("--lora_rnak", ["--lora_rank"])` → `" Did you mean '--lora_rank'?"`
    """
    known = list(known)
    now = _RENAMED.get(name.removeprefix("--"))
    if now and now.split()[0] in {flag.removeprefix("--") for flag in known}:
        return f" It is --{now} now."
    return nearest(name, known)


def _flag_reason(error: Exception, action, group: list[str]) -> str:
    """argparse's reason, with the value and the nearest of the allowed choices."""
    value = group[1] if len(group) > 1 else group[0].partition("=")[2]
    if action is not None and action.choices:
        return f"{value!r} is not allowed.{nearest(value, map(str, action.choices))} Allowed: " + ", ".join(
            map(str, action.choices)
        )
    if action is not None and value and getattr(action.type, "__name__", "") in ("int", "float"):
        return f"{value!r} is not a number ({action.type.__name__})"
    return error.message if isinstance(error, argparse.ArgumentError) else str(error)


def hints_of(types: tuple[type, ...]) -> dict[str, list]:
    """flag → its types, in the dataclasses and their parents: a recipe may narrow the type of a field."""
    found: dict[str, list] = {}
    for dataclass_type in types:
        for parent in dataclass_type.__mro__:
            if hasattr(parent, "__dataclass_fields__"):
                hints = get_type_hints(parent)
                for name in parent.__dataclass_fields__.keys() & hints.keys():
                    found.setdefault(name, []).append(hints[name])
    return found


def fits(value, hint) -> bool:
    """Whether a value from a JSON file has a flag's type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, member) for member in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if isinstance(origin or hint, type) and issubclass(origin or hint, Enum):
        return value in [member.value for member in hint]
    return hint is Any or (isinstance(origin or hint, type) and isinstance(value, origin or hint))


def type_in_words(hint) -> str:
    """A flag's type for a message: `int` → `"a whole number"`."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(type_in_words(member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint) or {list: "a list", dict: "an object"}.get(get_origin(hint) or hint, str(hint))
