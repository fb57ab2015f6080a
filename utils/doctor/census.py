"""Reads the texts of all rows in several processes, for duplicates, special tokens, broken Unicode and scripts."""

import functools
import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from utils.data.bad_rows import BadRow, unreadable
from utils.data.files import find_files, parse_row
from utils.data.parallel import Chunk, map_chunks
from utils.data.places import RowLocations, encode_source, locate_sources
from utils.data.report import RowRecord
from utils.data.row_type import RowType
from utils.doctor.text import broken_unicode, invisible, script_of
from utils.runtime.errors import UserError
from utils.tasks.task import Task


@dataclass
class Census:
    """Properties of the texts of all rows, one entry per row.

    Attributes:
        files: in the order of their indices in `sources`.
        sources: file and line of each row as one number, [rows] of int64.
        rows: hashes of the whole text, [rows] of uint64; `questions`: of the question alone.
        scripts: of question and answer, [rows, 2] of uint8.
        flags: code → (source, detail) of each row that has it.
        problems: the rows that cannot be read.
    """

    files: list[str] = field(default_factory=list)
    sources: Any = None
    rows: Any = None
    questions: Any = None
    scripts: Any = None
    flags: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    problems: list[RowRecord] = field(default_factory=list)

    def places(self, sources) -> dict[str, RowLocations]:
        """Returns the locations of some rows by file."""
        return locate_sources(sources, self.files)

    def only(self, rows) -> "Census":
        """Returns the census of the rows selected by a mask, [rows] of bool."""
        kept = set(self.sources[rows].tolist())
        flags = {code: [flag for flag in flags if flag[0] in kept] for code, flags in self.flags.items()}
        return Census(
            self.files,
            self.sources[rows],
            self.rows[rows],
            self.questions[rows],
            self.scripts[rows],
            {code: found for code, found in flags.items() if found},
        )


def _hash(texts: list[str]) -> int:
    """Hashes the words, so that rows which differ only in whitespace are equal."""
    words = "\x1e".join(" ".join(text.split()) for text in texts)
    return int.from_bytes(hashlib.blake2b(words.encode("utf-8", "replace"), digest_size=8).digest())


def census_chunk(row_type: RowType, special: re.Pattern | None, chunk: Chunk) -> Census:
    """Collects the census of one chunk of rows."""
    census = Census([], [], [], [], [])
    for raw in chunk.rows:
        row = parse_row(raw)
        source = encode_source(chunk.number, row.line)
        try:
            if row.problem:
                raise unreadable(row)
            reading = row_type.texts(row_type.read(row.value))
        except BadRow as error:
            census.problems.append(RowRecord(chunk.file, row.line, error.kind, str(error)))
            continue
        question, answer = "\n".join(reading.question), "\n".join(reading.answers)
        census.sources.append(source)
        census.rows.append(_hash([*reading.question, "\x1d", *reading.answers]))
        census.questions.append(_hash(reading.question or reading.answers))
        census.scripts.append((script_of(question), script_of(answer)))
        whole = f"{question}\n{answer}"
        found = {"UNICODE_BROKEN": broken_unicode(whole), "INVISIBLE_CHARACTERS": invisible(whole)}
        if special and (match := special.search(whole)):
            found["SPECIAL_TOKEN_IN_CONTENT"] = match[0]
        for code, detail in found.items():
            if detail:
                census.flags.setdefault(code, []).append((source, detail))
    return census


def take_census(paths: str, flag: str, task: Task, special: re.Pattern | None = None, workers: int | None = None):
    """Reads the texts of all rows, with a progress bar for large files.

    Args:
        paths: as given to `flag`.
        flag: the flag's name.
        task: of the rows.
        special: matches special tokens that a content must not have.
        workers: processes; None to choose by the size of the files.

    Returns:
        Census

    Raises:
        UserError: a file is missing.
    """
    import numpy

    files, problems = find_files(paths, flag, task.file_suffixes)
    if problems:
        raise UserError(*problems)
    whole = Census(files, [], [], [], [])
    for part in map_chunks(functools.partial(census_chunk, task.row_type, special), files, workers, "reading texts"):
        for name in ("sources", "rows", "questions", "scripts", "problems"):
            getattr(whole, name).extend(getattr(part, name))
        for code, found in part.flags.items():
            whole.flags.setdefault(code, []).extend(found)
    whole.sources = numpy.array(whole.sources, numpy.int64)
    whole.rows, whole.questions = numpy.array(whole.rows, numpy.uint64), numpy.array(whole.questions, numpy.uint64)
    whole.scripts = numpy.array(whole.scripts, numpy.uint8).reshape(-1, 2)
    return whole


def join(parts: list[Census]) -> Census:
    """Joins the census of several sources; the numbers of their files continue from one to the next."""
    import numpy

    if len(parts) == 1:
        return parts[0]
    joined, starts = Census(), numpy.cumsum([0, *(len(part.files) for part in parts)])
    for part, start in zip(parts, starts, strict=False):
        first = encode_source(int(start), 0)
        joined.files += part.files
        joined.problems += part.problems
        part.sources = part.sources + first
        for code, found in part.flags.items():
            joined.flags.setdefault(code, []).extend((source + first, detail) for source, detail in found)
    for name in ("sources", "rows", "questions", "scripts"):
        setattr(joined, name, numpy.concatenate([getattr(part, name) for part in parts]))
    return joined
