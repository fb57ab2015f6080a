"""Runs a command's main: a `UserError` becomes a message on stderr and exit code 2, without a traceback."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from utils.runtime.distributed import exit_process, is_local_main_process, wait_for_everyone
from utils.runtime.errors import ERROR_FILE, Interrupted, UserError
from utils.runtime.log import is_main_process
from utils.runtime.startup import limit_kernel_caches, relax_gc


def run_command(main: Callable[[], object]) -> None:
    """Runs a command's `main`: a `UserError` becomes a message on stderr and exit code 2."""
    code = 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8; stderr does so by itself
    relax_gc()
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
        _write_problems(error)
        # another process of this machine would only repeat the first one's message
        if is_local_main_process():
            print(error, file=sys.stderr)
        code = 2
    except Interrupted as stopped:
        if is_main_process():
            print(stopped, file=sys.stderr, flush=True)
        wait_for_everyone()  # launchers kill the rest once one has left, before it could say so
        code = 128 + stopped.signum
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    exit_process(code)
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


def _write_problems(error: UserError) -> None:
    """Writes the problems as JSON into the file that a parent process named, which then need not read our output."""
    if (file := os.environ.get(ERROR_FILE)) and is_local_main_process():
        with contextlib.suppress(OSError):  # the message itself goes to stderr
            Path(file).write_text(json.dumps([asdict(problem) for problem in error.problems]), encoding="utf-8")
