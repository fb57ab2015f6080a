"""A file of answers that is written as they come, and continued after an interruption."""

import fcntl
import json
import os
from pathlib import Path

from loguru import logger

from utils.runtime.errors import UserError, raise_if_any
from utils.storage.files import replace_file

_BEGIN = b'{"settings": '


def partial_of(path: str) -> Path:
    """The file that holds the answers until all of them are written."""
    return Path(f"{path}.partial")


def check_output(path: str, overwrite: bool) -> list[str]:
    """The problems of `--output`, a file to write answers into."""
    if Path(path).suffix != ".jsonl":
        return [f"--output {path!r} does not end in .jsonl, the format it is written in; give such a name"]
    if Path(path).is_dir():
        return [f"--output {path!r} is a folder; give a file"]
    if Path(path).exists() and not overwrite and not partial_of(path).exists():
        return [_exists(path)]
    return []


def _exists(path: str) -> str:
    return f"--output {path!r} exists; give another file, or --overwrite true to replace it"


class AnswerFile:
    """Answers to numbered rows, appended as they come and sorted by row at the end.

    They are appended to `<path>.partial`, whose first line holds the settings they were made with; a later start
    continues that file. When all are written they are sorted into `path`, by an atomic rename.

    Args:
        path: the finished file.
        settings: what all answers must have in common: name for messages → JSON value.
        wanted: the numbers of the rows to answer.
        overwrite: whether to replace a finished file, or an unfinished one of other settings.

    Attributes:
        done: the numbers of the rows already answered.

    Raises:
        UserError: another process is writing it, it exists already, or it was started with other settings.
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
            if (
                self.path.exists() and not overwrite and wanted - self.done
            ):  # if none is missing, it was killed before the rename
                raise UserError(_exists(path))
        except BaseException:
            self.close()
            raise

    def _begin(self, settings: dict, overwrite: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{str(self.partial)!r} is being written by another process; wait for it, or stop it"
            ) from None
        self._refuse_foreign(overwrite)
        before, answers, size = self._read()
        if before is not None and before != settings:
            if not overwrite:
                raise UserError(
                    f"{str(self.partial)!r} was started with other settings: {differences(before, settings)}. "
                    "Give the same ones to continue it, another --output, or --overwrite true to start anew"
                )
            before = None
        if before is None:
            self._file.truncate(0)
            self._write({"settings": settings})
        else:
            if size < os.fstat(self._file.fileno()).st_size:
                logger.warning("{}: an incomplete last line is removed", self.partial)
                self._file.truncate(size)
            self.done = answers
            logger.info("{}: continuing after {:,} answers", self.partial, len(answers))

    def _read(self) -> tuple[dict | None, set[int], int]:
        """The settings, the numbers of the answered rows, and the length of the complete lines in bytes."""
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
            raise UserError(f"{str(self.partial)!r} was not written by infer; move it, or give --overwrite true")

    def write(self, number: int, row: dict) -> None:
        """Appends the answer to a row, and flushes it, so that it survives a kill of the process."""
        self._write({"number": number, "row": row})
        self.done.add(number)

    def _write(self, entry: dict) -> None:
        try:
            self._file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise self._write_failed(error) from error

    def finish(self) -> None:
        """Sorts the answers into the finished file."""
        self._file.seek(0)
        entries = [json.loads(line) for line in self._file][1:]
        entries.sort(key=lambda entry: entry["number"])
        try:
            with replace_file(self.path) as part, part.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(entry["row"], ensure_ascii=False) + "\n" for entry in entries)
        except OSError as error:
            raise self._write_failed(error) from error
        self.partial.unlink()
        self.close()

    def close(self) -> None:
        """Closes the file; a later start can continue it."""
        self._file.close()

    def _write_failed(self, error: OSError) -> UserError:
        return UserError(
            f"--output {str(self.path)!r} cannot be written: {error.strerror}. Free some space; "
            "the same command then continues"
        )


def differences(before: dict, now: dict) -> str:
    """`differences({"--seed": 1}, {"--seed": 2})` → `"--seed was 1 and is 2"`"""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)
