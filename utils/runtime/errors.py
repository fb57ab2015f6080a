"""Errors in the user's input: all problems in one message, without a traceback, exit code 2."""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ERROR_FILE = "LLM_DOJO_ERROR_FILE"  # the environment variable that names a file for a command's problems


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the user's input. `str(problem)` is the message with the remedy.

    The text is for people; code reads the other attributes.

    Attributes:
        message: names the value and what is allowed.
        code: the doctor's code of such a problem, a key of `utils.doctor.codes.CODES`.
        flags: names of the flags that it is about, without dashes, the main one first: `("lora_rank",)`.
        file: the data file that it is about.
        line: the line in `file`.
        remedy: what to do about it, where it is not part of the message.
    """

    message: str
    code: str = "ARGUMENTS"
    flags: tuple[str, ...] = ()
    file: str | None = None
    line: int | None = None
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class UserError(Exception):
    """Something the user gave cannot be used.

    Each problem names the value, what is allowed and the remedy.

    Args:
        *problems: one for each thing that is wrong; a text becomes a `Problem`. Empty ones are left out.

    Attributes:
        problems: list of Problem.
    """

    def __init__(self, *problems: str | Problem | None):
        found = (problem if isinstance(problem, Problem) else Problem(problem or "") for problem in problems)
        self.problems = [problem for problem in found if problem.message]
        super().__init__(*self.problems)  # so that it is the same error after pickling

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"error: {self.problems[0]}"
        numbered = (f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1))
        return f"{len(self.problems)} errors:\n" + "\n".join(numbered)

    def sentences(self) -> str:
        """The problems without a heading, for a line of other text."""
        return "; ".join(map(str, self.problems))


class Interrupted(Exception):
    """A signal ended the training after a step, with a checkpoint.

    Args:
        signum: the signal's number.
        message: how to go on.
    """

    def __init__(self, signum: int, message: str):
        self.signum = signum
        super().__init__(message)


def is_disk_error(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is a failed write; not every library raises `OSError` for it."""
    if error is None or isinstance(error, UserError):
        return False
    # torch 2.13 raises RuntimeError ("… file write failed", "unexpected pos 64 vs 0"), safetensors 0.8 its own
    # SafetensorError ("… I/O error: No space left on device (os error 28)"), both without an errno
    signs = ("no space left", "file write failed", "unexpected pos", "os error", "file too large")
    here = isinstance(error, OSError) or any(sign in str(error).lower() for sign in signs)
    return here or is_disk_error(error.__cause__ or error.__context__)


def first_line(error: BaseException, limit: int = 300) -> str:
    """`"ValueError: no such file"`: an exception's type and the beginning of its text, for a message of ours.

    torch's own errors go on with the stack of its C++ code.
    """
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:limit]}" if text else type(error).__name__


def in_one_line(text: object, limit: int | None = None) -> str:
    """Joins the lines of a text or an exception's message, cut to `limit` characters."""
    return " ".join(str(text).split())[:limit]


def refusal(message: str, *flags: str, code: str = "ARGUMENTS") -> list[Problem]:
    """Returns one problem as a list, for a check to return or to add to others.

    Args:
        message: names the value, what is allowed and the remedy.
        *flags: names of the flags that it is about, without dashes, the main one first.
        code: the doctor's, as in `Problem`.
    """
    return [Problem(message, code, flags)]


def raise_if_any(problems: Iterable[str | Problem]) -> None:
    """Raises one `UserError` with all the problems, if there are any."""
    problems = list(problems)
    if problems:
        raise UserError(*problems)


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`nearest("qwem", ["qwen", "yi"])` → `" Did you mean 'qwen'?"`, or an empty text."""
    return _did_you_mean(difflib.get_close_matches(word, list(allowed), n=3, cutoff=0.6))


def nearest_path(path: str, paths: Iterable[Path]) -> str:
    """As `nearest`, of paths in one folder by their names: the folder they share would make all of them alike."""
    found = {each.name: str(each) for each in paths}
    return _did_you_mean([found[name] for name in difflib.get_close_matches(Path(path).name, found, n=3, cutoff=0.6)])


def _did_you_mean(close: list[str]) -> str:
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def read_problems(file: Path) -> UserError | None:
    """Reads the error that a child process wrote to its `ERROR_FILE`; None if it wrote none."""
    if not file.is_file():
        return None
    problems = json.loads(file.read_text(encoding="utf-8"))
    return UserError(*(Problem(**problem | {"flags": tuple(problem["flags"])}) for problem in problems))


def load_failure(what: str, flag: str, path: str, error: Exception) -> str:
    """One line for a load that failed, without the address lists that hub errors carry."""
    reason = re.sub(r"https?://[^\s'\"]+", "the hub", in_one_line(error))
    return (
        f"the {what} of {flag} {path!r} cannot be loaded: {type(error).__name__}: {reason[:400]}. "
        "Give a folder with a model saved by transformers, or a name the hub has"
    )
