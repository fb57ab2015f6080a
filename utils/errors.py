"""How bad input is told to a person: every problem in one message, exit code 2, no traceback."""

import difflib
import io
import os
import sys
from collections.abc import Callable, Iterable

from utils.imports import import_seldom_collecting, limit_kernel_caches
from utils.launch import is_first_here, leave, wait_for_all
from utils.log import is_main_process


class UserError(Exception):
    """Something the user gave cannot be used.

    Each problem names the value, what is allowed and the remedy.

    Args:
        *problems: one text for each thing that is wrong.
    """

    def __init__(self, *problems: str):
        self.problems = [problem for problem in problems if problem]
        super().__init__("\n".join(self.problems))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"error: {self.problems[0]}"
        numbered = (f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1))
        return f"{len(self.problems)} errors:\n" + "\n".join(numbered)


class Interrupted(Exception):
    """A signal ended the training after a step, with a checkpoint.

    Args:
        signum: the signal's number.
        message: how to go on.
    """

    def __init__(self, signum: int, message: str):
        self.signum = signum
        super().__init__(message)


def is_about_the_disk(error: BaseException | None) -> bool:
    """Whether a write failed; torch, safetensors and datasets tell it in exceptions of their own."""
    if error is None or isinstance(error, UserError):
        return False
    signs = ("no space left", "file write failed", "unexpected pos", "os error", "file too large")
    here = isinstance(error, OSError) or any(sign in str(error).lower() for sign in signs)
    return here or is_about_the_disk(error.__cause__ or error.__context__)


def first_line(error: BaseException) -> str:
    """`"ValueError: no such file"`: an exception's type and the beginning of its text, for a message of ours."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def raise_if_any(problems: Iterable[str]) -> None:
    """Raises one `UserError` with all the problems, if there are any."""
    problems = list(problems)
    if problems:
        raise UserError(*problems)


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`nearest("qwem", ["qwen", "yi"])` → `" Did you mean 'qwen'?"`, or an empty text."""
    close = difflib.get_close_matches(word, list(allowed), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def run_command(main: Callable[[], object]) -> None:
    """Runs a command's `main`: a `UserError` becomes a message on stderr and exit code 2."""
    code = 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8; stderr does so by itself
    import_seldom_collecting()
    limit_kernel_caches()
    try:
        _run_and_print(main)
    except OSError as error:
        if not _stdout_is_gone():
            raise
        code = 128 + 13  # as if by SIGPIPE: `| head` has read enough
        if not isinstance(error, BrokenPipeError):
            print(f"error: what was said cannot be written to stdout: {error.strerror}", file=sys.stderr)
            code = 2
    except UserError as error:
        # another process of this machine would only repeat the first one's message
        if is_first_here():
            print(error, file=sys.stderr)
        code = 2
    except Interrupted as stopped:
        if is_main_process():
            print(stopped, file=sys.stderr, flush=True)
        wait_for_all()  # launchers kill the rest once one has left, before it could say so
        code = 128 + stopped.signum
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    leave(code)
    if code:
        sys.exit(code)


def _run_and_print(main: Callable[[], object]) -> None:
    """Runs `main` and writes what it printed, so that a reader who has left is noticed here and not at the exit."""
    try:
        main()
    except SystemExit:
        _flush()
        raise
    _flush()


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _stdout_is_gone() -> bool:
    """Whether nothing can be written to stdout any more; then what is left for it goes nowhere."""
    if sys.stdout is None:
        return False
    try:
        print(flush=True)  # where stdout has no buffer there is nothing left to flush
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return True
    return False
