"""The sources of `--train_data_path`: entries with weights, or a YAML file with settings for each."""

import json
import math
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.data.columns import parse_columns
from utils.data.files import find_files
from utils.data.source_names import short_names
from utils.runtime.errors import Problem, nearest, refusal
from utils.storage.files import project_path

_FLAG = "train_data_path"
_CONTROLS = ("Cc", "Zl", "Zp")  # Unicode categories: control characters, separators of lines and of paragraphs
_YAML = (".yaml", ".yml")
_KEYS = ("path", "name", "weight", "rows", "repeat", "columns", "system", "template_args")


@dataclass(frozen=True)
class Source:
    """One source of training rows.

    Attributes:
        path: files, folders and globs, separated by commas.
        name: in logs and tables.
        weight: its share of an epoch, in relation to the other weights; None without.
        rows: how many of its rows an epoch takes; None for all.
        repeat: how often an epoch goes through them.
        columns: as `--columns`, for this source; None for the value of `--columns`.
        system: the system message of rows without one; None for the template's default.
        template_args: arguments of the chat template, such as `{"enable_thinking": False}`.
    """

    path: str
    name: str = ""
    weight: float | None = None
    rows: int | None = None
    repeat: float = 1.0
    columns: str | None = None
    system: str | None = None
    template_args: dict[str, Any] = field(default_factory=dict)


def is_mixture(args) -> bool:
    """Whether the training rows are a mixture of sources, each prepared by itself, rather than a list of files.

    Args:
        args: CommonArgs.
    """
    paths = args.train_data_path
    return bool(paths) and (args.mixing_strategy is not None or gives_settings(paths))


def gives_settings(paths: str) -> bool:
    """Whether a value gives weights, or is a YAML file with settings of sources."""
    return _is_yaml(paths) or has_weights(paths)


def has_weights(paths: str) -> bool:
    """Whether an entry of a comma-separated list ends with a weight, as in `a.jsonl:0.7`."""
    return not _is_yaml(paths) and any(_split_weight(entry)[1] is not None for entry in _entries(paths))


def read_sources(paths: str) -> tuple[list[Source], list[Problem]]:
    """Reads the value of `--train_data_path`, with all problems at once.

    `"a.jsonl:0.7,b.parquet:0.3"` → `[Source("a.jsonl", "a", 0.7), Source("b.parquet", "b", 0.3)]`
    """
    sources, problems = _read_yaml(paths) if _is_yaml(paths) else _read_list(paths)
    names = short_names([source.path for source in sources])
    sources = [_named(source, name) for source, name in zip(sources, names, strict=True)]
    for name in dict.fromkeys(source.name for source in sources):
        if len({source.path for source in sources if source.name == name}) > 1:  # of one path: see `source_files`
            problems += refusal(f"--train_data_path has two sources with the name {name!r}; give each its own", _FLAG)
    without = [source.name for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        problems += refusal(
            f"--train_data_path gives a weight to some sources, and none to {', '.join(map(repr, without))}; give one "
            "to each, or to none",
            _FLAG,
        )
    return sources, problems


def source_files(sources: list[Source], suffixes: tuple[str, ...]) -> tuple[list[list[str]], list[Problem]]:
    """Finds the files of each source; a file of two sources is a problem.

    Args:
        sources: from `read_sources`.
        suffixes: the kinds of file the task reads.
    """
    files, problems, source_of = [], [], {}
    for source in sources:
        found, wrong = find_files(source.path, f"--{_FLAG}", suffixes)
        files.append(found)
        problems += wrong
        for file in found:
            first = source_of.setdefault(Path(file).resolve(), source)
            if first is not source:
                message = f"--train_data_path has {file!r} in two sources, {first.name!r} and {source.name!r}"
                problems += refusal(f"{message}; keep it in one, and repeat that one if it is to count more", _FLAG)
    return files, problems


def plain_paths(paths: str) -> str:
    """The files, folders and globs of all sources as one list: `"a.jsonl:0.7,b/:0.3"` → `"a.jsonl,b/"`."""
    return ",".join(source.path for source in read_sources(paths)[0])


def _named(source: Source, name: str) -> Source:
    return source if source.name else Source(**{**vars(source), "name": name})


def _entries(paths: str) -> list[str]:
    return [part.strip() for part in paths.split(",") if part.strip()]


def _is_yaml(paths: str) -> bool:
    return "," not in paths and Path(paths.strip()).suffix.lower() in _YAML


def _split_weight(entry: str) -> tuple[str, float | None]:
    """`"a.jsonl:0.7"` → `("a.jsonl", 0.7)`; a path that has a colon itself is no weight."""
    path, colon, text = entry.rpartition(":")
    if not colon or not path or Path(project_path(str(Path(entry).expanduser()))).exists():
        return entry, None
    try:
        return path, float(text)
    except ValueError:
        return entry, None


def _read_list(paths: str) -> tuple[list[Source], list[Problem]]:
    sources, problems = [], []
    for entry in _entries(paths):
        path, weight = _split_weight(entry)
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            problems += refusal(f"--train_data_path {entry!r}: the weight must be a number above 0", _FLAG)
        sources.append(Source(path, weight=weight))
    return sources, problems


def _read_yaml(path: str) -> tuple[list[Source], list[Problem]]:
    """Reads a YAML file: a list of objects with the keys of `Source`."""
    import yaml

    file = project_path(str(Path(path.strip()).expanduser()))
    try:
        with open(file, encoding="utf-8") as opened:
            loader = yaml.SafeLoader(opened)
            root = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        return [], refusal(f"--train_data_path {path!r} cannot be read: {reason}; give another file", _FLAG)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        return [], refusal(f"--train_data_path {where} is not YAML: {getattr(error, 'problem', error)}", _FLAG)
    except RecursionError:
        return [], refusal(f"--train_data_path {path!r} has lists in lists that are nested too deeply", _FLAG)
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        shape = "a list of sources, each with at least a path: '- path: a.jsonl'"
        return [], refusal(f"--train_data_path {path!r} is not {shape}; see docs/data.md", _FLAG)
    sources, problems = [], []
    for node in root.value:
        source, wrong = _read_entry(loader, node, path)
        problems += wrong
        sources += [source] if source else []
    return sources, problems


def _read_entry(loader, node, path: str) -> tuple[Source | None, list[Problem]]:
    """Reads one entry of the YAML file; None if it has no usable path."""
    import yaml

    problems: list[Problem] = []

    def refuse(line: int, message: str) -> None:
        problems.append(Problem(f"{path}:{line} {message}", flags=(_FLAG,), file=path, line=line))

    first = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        refuse(first, "is no source; write '- path: a.jsonl', and below it its other settings")
        return None, problems
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key not in _KEYS:
            refuse(line, f"{key!r} is no setting of a source.{nearest(key, _KEYS)} Known: {', '.join(_KEYS)}")
        elif key in values:
            refuse(line, f"{key!r} is given twice; keep one")
        else:
            try:
                values[key], wrong = _checked(key, loader.construct_object(value_node, deep=True))
            except yaml.YAMLError as error:
                values[key], wrong = None, f"cannot be read: {getattr(error, 'problem', error)}"
            # from PyYAML's conversions of dates (2024-99-99), of long numbers, of tags (!!bool x) and of nested lists
            except (ValueError, LookupError, AttributeError, OverflowError, RecursionError):
                text = repr(value_node.value[:40]) if isinstance(value_node, yaml.ScalarNode) else "a part of it"
                values[key], wrong = None, f"{text} cannot be read as a value; give a number, or a text in quotes"
            if wrong:
                refuse(line, f"{key}: {wrong}")
    if "path" not in values:
        refuse(first, "has no path; give a file, a folder or a glob")
    if problems:
        values = {key: value for key, value in values.items() if value is not None}
    return (Source(**values) if values.get("path") else None), problems


def _checked(key: str, value: Any) -> tuple[Any, str]:
    """Returns the value of a setting as `Source` has it, and what is wrong with it; empty if nothing is."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if key in ("path", "name", "system"):
        right = isinstance(value, str) and bool(value.strip())
        if right and key != "system" and any(unicodedata.category(letter) in _CONTROLS for letter in value):
            return None, f"{value!r} has a line feed or another control character; remove it"
        return (value, "") if right else (None, f"{value!r} is not a text")
    if key in ("weight", "repeat"):
        return (float(value), "") if is_number and value > 0 else (None, f"{value!r} is not a number above 0")
    if key == "rows":
        right = is_number and value >= 1 and value == int(value)
        return (int(value), "") if right else (None, f"{value!r} is not a whole number of at least 1")
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return None, f"{value!r} cannot be written as JSON"
    if key == "template_args":
        right = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        return (value, "") if right else (None, f"{value!r} does not name arguments, as 'enable_thinking: false' does")
    wrong = parse_columns(text)[1]
    return (None, str(wrong[0])) if wrong or not isinstance(value, dict) else (text, "")
