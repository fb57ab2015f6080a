"""Finds data files and reads their raw rows."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.data.indexed import read_indexed
from utils.data.json_rows import (
    COMPRESSIONS,
    NOT_UTF8,
    RawRow,
    bad_bytes,
    kind_of_file,
    open_text,
    parse_line,
    read_json,
)
from utils.data.splits import DESCRIPTIONS, choose_split, is_cache_of_datasets
from utils.data.tables import read_arrow, read_csv, read_parquet
from utils.runtime.errors import Problem, nearest_path, refusal
from utils.storage.files import project_path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
TEXT_SUFFIXES = (*SUFFIXES, ".txt", ".bin")  # .bin: token ids of Megatron-LM, which have no labels
_MAX_NAMES = 10  # of files, in one message


def find_files(paths: str, flag: str, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[list[str], list[Problem]]:
    """Expands files, folders and globs, separated by commas.

    `"a.jsonl,more/"` → `(["a.jsonl", "more/b.csv"], [])`

    Args:
        paths: as given to `flag`.
        flag: the flag's name, for the messages.
        suffixes: the kinds of file the task reads.

    Returns:
        the files in a fixed order, and the problems.
    """
    files, problems, _ = _find(paths, flag, suffixes)
    return files, problems


def files_left_out(paths: str, flag: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
    """Describes for each folder the files that a flag leaves out: those of another split, and of another kind.

    `["--train_data_path 'my/set' takes the training split; left out: test.jsonl (test)"]`
    """
    return _find(paths, flag, suffixes)[2]


def _find(paths: str, flag: str, suffixes: tuple[str, ...]) -> tuple[list[str], list[Problem], list[str]]:
    """The files, the problems, and what is left out."""
    files: dict[tuple[int, int], str] = {}  # device and inode → file, since paths may be spelled differently
    parts = [part.strip() for part in paths.split(",") if part.strip()]
    problems, notes, name = _named_twice(parts, flag), [], flag.removeprefix("--")
    for part in dict.fromkeys(parts):
        path = project_path(str(Path(part).expanduser()))
        try:
            found, problem = _expand(path, suffixes)
            if Path(path).is_dir() and not problem:
                notes += _files_of_other_kinds(path, suffixes, f"{flag} {part!r}")
                found, left_out, problem = choose_split(path, found, flag)
                if left_out:
                    what = "training" if flag == "--train_data_path" else "validation"
                    notes.append(f"{flag} {part!r} takes the {what} split; left out: {', '.join(left_out)}")
        except OSError as error:  # a parent folder without permission, or a name that is too long
            found, problem = [], f"cannot be read: {error.strerror}; choose another file, or have its owner allow it"
        if problem:
            problems += refusal(f"{flag} {part!r} {problem}", name)
        for file in found:
            if Path(file).stat().st_size == 0:
                problems += refusal(f"{flag} {file!r} is empty (0 bytes)", name)
            elif not os.access(file, os.R_OK):
                problems += refusal(f"{flag} {file!r} may not be read by this user; allow it with chmod u+r", name)
            files.setdefault(_identity(file), file)
    if not files and not problems:
        problems += refusal(f"{flag} {paths!r} names no file", name)
    return list(files.values()), problems, notes


def _identity(file: str) -> tuple[int, int]:
    status = Path(file).stat()
    return status.st_dev, status.st_ino


def _named_twice(parts: list[str], flag: str) -> list[Problem]:
    """Describes each file or folder that is named more than once, also under different spellings."""
    spellings: dict[Any, list[str]] = {}
    for part in parts:
        path = Path(project_path(str(Path(part).expanduser())))
        try:
            key = _identity(str(path))
        except OSError:  # a glob, or what does not exist
            key = part
        spellings.setdefault(key, []).append(part)
    problems = []
    for names in spellings.values():
        if len(names) > 1:
            shown = " and ".join(map(repr, dict.fromkeys(names)))
            one = ", which are one file," if len(set(names)) > 1 else ""
            message = f"{flag} names {shown}{one} {len(names)} times, and a file is read once; name it once"
            problems += refusal(message, flag.removeprefix("--"))
    return problems


def _files_in(folder: str) -> list[Path]:
    """The files below a folder that may be data: neither hidden nor a description of the data set."""
    return sorted(
        path
        for path in Path(folder).rglob("*")
        if path.is_file()
        and path.name not in DESCRIPTIONS
        and not is_cache_of_datasets(path)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _files_of_other_kinds(folder: str, suffixes: tuple[str, ...], name: str) -> list[str]:
    """A note of the files in a folder that may be data but are of no kind that is read; empty if there are none."""
    others = [
        str(path.relative_to(folder))
        for path in _files_in(folder)
        if not _is_read(path, suffixes)
        and path.stem.upper() not in ("README", "LICENSE")
        and not (path.suffix == ".idx" and ".bin" in suffixes)  # read with its .bin
    ]
    if not others:
        return []
    more = f" and {len(others) - _MAX_NAMES:,} more" if len(others) > _MAX_NAMES else ""
    shown = ", ".join(others[:_MAX_NAMES])
    return [f"{name} has files that are not read: {shown}{more}; kinds read: {', '.join(suffixes)}"]


def _is_read(file: str | Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file is of a kind that is read; text may be compressed, Parquet and Arrow compress by themselves."""
    kind = kind_of_file(file)
    compressed = Path(file).suffix.lower() in COMPRESSIONS
    return kind in suffixes and not (compressed and kind in (".parquet", ".arrow", ".bin"))


def _expand(path: str, suffixes: tuple[str, ...]) -> tuple[list[str], str | None]:
    allowed = f"{', '.join(suffixes)} (text also as {' or '.join(COMPRESSIONS)})"
    if Path(path).is_dir():
        found = sorted(str(p) for p in _files_in(path) if _is_read(p, suffixes))
        return found, None if found else f"is a folder without any file of the kinds {allowed}"
    if glob.has_magic(path) and not Path(path).exists():
        found = sorted(p for p in glob.glob(path, recursive=True) if Path(p).is_file())
        wrong = [p for p in found if not _is_read(p, suffixes)]
        if wrong:
            return [], f"matches {wrong[0]!r}, which is not one of {allowed}"
        return found, None if found else "matches no file"
    if Path(path).exists() and not Path(path).is_file():
        return [], "is not a plain file"
    if Path(path).is_symlink() and not Path(path).exists():
        return [], f"is a link to {str(Path(path).readlink())!r}, which does not exist"
    if not Path(path).is_file():
        parent = Path(path).parent
        siblings = parent.iterdir() if parent.is_dir() else []
        return [], f"does not exist.{nearest_path(path, siblings)}"
    if not _is_read(path, suffixes):
        return [], f"is not one of the kinds of file this task reads: {allowed}"
    return [path], None


def read_rows(file: str) -> Iterator[RawRow]:
    """Yields the rows of a file; one that cannot be read has a `problem`."""
    return map(parse_row, raw_rows(file))


def raw_rows(file: str) -> Iterator[RawRow]:
    """Yields the rows of a file; lines of JSON unparsed, since `parse_row` is left to the worker processes."""
    reader = {
        ".jsonl": read_json,
        ".json": read_json,
        ".csv": read_csv,
        ".parquet": read_parquet,
        ".arrow": read_arrow,
        ".bin": read_indexed,
    }
    try:
        yield from reader.get(kind_of_file(file), _read_text)(file)
    except OSError as error:
        yield RawRow(file, 0, None, f"cannot be read: {error.strerror or error}", fatal=True)


def parse_row(row: RawRow) -> RawRow:
    """Parses a row; one that cannot be read gets a `problem`."""
    row = parse_line(row.file, row.line, row.value) if row.unparsed else row
    if _has_bad_bytes(row.value):
        return row._replace(problem=NOT_UTF8, value=None, broken_unicode=True)
    return row


def count_rows(files: list[str]) -> int | None:
    """Counts the lines of `.jsonl` files for a progress bar; returns None if there are other files."""
    if any(Path(file).suffix.lower() != ".jsonl" for file in files):
        return None
    count = 0
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                count += block.count(b"\n")
    return count


def _has_bad_bytes(value: Any) -> bool:
    """Whether a row has bytes that are not UTF-8, which are read as lone surrogates so that only that row is lost."""
    items = value.items() if isinstance(value, dict) else ()
    return any(isinstance(text, str) and bad_bytes(text) for item in items for text in item)


def _read_text(file: str) -> Iterator[RawRow]:
    """Yields the paragraphs of a .txt file, which blank lines separate."""
    paragraph: list[str] = []
    start = 1
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                if not paragraph:
                    start = number
                paragraph.append(line)
            elif paragraph:
                yield RawRow(file, start, {"text": "".join(paragraph).rstrip("\n")})
                paragraph = []
    if paragraph:
        yield RawRow(file, start, {"text": "".join(paragraph).rstrip("\n")})
