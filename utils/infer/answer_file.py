"""A file of answers that is written as they come, and gone on with after a kill."""

import fcntl
import json
import os
from pathlib import Path

from loguru import logger

from utils.runtime.errors import UserError, raise_if_any
from utils.storage.files import replace_file

_BEGIN = b'{"settings": '


def partial_of(path: str) -> Path:
    """Where the answers stand until all are there."""
    return Path(f"{path}.partial")


def check_output(path: str, overwrite: bool) -> list[str]:
    """The problems of a file that answers are to be written into."""
    if Path(path).suffix != ".jsonl":
        return [f"--output {path!r} is not a .jsonl file, and it will be one; give such a name"]
    if Path(path).is_dir():
        return [f"--output {path!r} is a folder; give a file"]
    if Path(path).exists() and not overwrite and not partial_of(path).exists():
        return [_exists(path)]
    return []


def _exists(path: str) -> str:
    return f"--output {path!r} exists; give another file, or --overwrite true to replace it"


class AnswerFile:
    """Answers to numbered rows, in the order they come, and at the end in the order of the rows.

    Until all are there they stand in `<path>.partial`: a first line that says what they were made with, then a line
    for each answer. A second start finds them. At the end they are sorted into `path`, which is whole or not there.

    Args:
        path: the finished file.
        settings: what all its answers must have in common, by the names that a user knows; values that JSON holds.
        wanted: the numbers of the rows that are to be answered.
        overwrite: whether a finished file, or an unfinished one of other settings, may go.

    Attributes:
        done: the numbers of the rows that are answered.

    Raises:
        UserError: another process writes it, it is finished already, or was begun with other settings.
    """

    def __init__(self, path: str, settings: dict, wanted: set[int], overwrite: bool = False):
        self.path, self.partial = Path(path), partial_of(path)
        self.done: set[int] = set()
        raise_if_any(check_output(path, overwrite))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.partial, "ab+")  # noqa: SIM115  (open until finish or close)
        except OSError as error:
            raise UserError(f"--output {path!r} cannot be written: {error.strerror}; give another file") from error
        try:
            self._begin(settings, overwrite)
            if self.path.exists() and not overwrite and wanted - self.done:  # else: killed right before its end
                raise UserError(_exists(path))
        except BaseException:
            self.close()
            raise

    def _begin(self, settings: dict, overwrite: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{str(self.partial)!r} is being written by another process; wait, or end it") from None
        self._refuse_foreign(overwrite)
        before, answers, size = self._read()
        if before is not None and before != settings:
            if not overwrite:
                raise UserError(
                    f"{str(self.partial)!r} was begun with other settings: {differences(before, settings)}. "
                    "Give what it was begun with to go on, another --output, or --overwrite true to begin anew"
                )
            before = None
        if before is None:
            self._file.truncate(0)
            self._write({"settings": settings})
        else:
            if size < os.fstat(self._file.fileno()).st_size:
                logger.warning("{}: a line that was not written to its end is cut off", self.partial)
                self._file.truncate(size)
            self.done = answers
            logger.info("{}: {:,} answers are there; going on", self.partial, len(answers))

    def _read(self) -> tuple[dict | None, set[int], int]:
        """The settings, the numbers of the answers, and how many bytes are whole lines."""
        self._file.seek(0)
        settings, numbers, size = None, set(), 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if settings is None:
                    settings = entry["settings"]
                else:
                    numbers.add(entry["number"])
            except (ValueError, KeyError, TypeError):
                break
            size += len(line)
        return settings, numbers, size

    def _refuse_foreign(self, overwrite: bool) -> None:
        self._file.seek(0)
        begin = self._file.read(len(_BEGIN))
        if not _BEGIN.startswith(begin) and not overwrite:
            raise UserError(f"{str(self.partial)!r} is none of this command's; move it, or give --overwrite true")

    def write(self, number: int, row: dict) -> None:
        """Adds the answer to a row; a process that is killed afterwards has not lost it."""
        self._write({"number": number, "row": row})
        self.done.add(number)

    def _write(self, entry: dict) -> None:
        try:
            self._file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise self._full(error) from error

    def finish(self) -> None:
        """Sorts the answers into the finished file."""
        self._file.seek(0)
        entries = [json.loads(line) for line in self._file][1:]
        entries.sort(key=lambda entry: entry["number"])
        try:
            with replace_file(self.path) as part, part.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(entry["row"], ensure_ascii=False) + "\n" for entry in entries)
        except OSError as error:
            raise self._full(error) from error
        self.partial.unlink()
        self.close()

    def close(self) -> None:
        """Leaves the file for a later start."""
        self._file.close()

    def _full(self, error: OSError) -> UserError:
        return UserError(
            f"--output {str(self.path)!r} cannot be written: {error.strerror}. Make room; the same command then goes on"
        )


def differences(before: dict, now: dict) -> str:
    """`differences({"--seed": 1}, {"--seed": 2})` → `"--seed was 1 and is 2"`"""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)
