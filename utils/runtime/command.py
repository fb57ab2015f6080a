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
    """Runs a command's `main` and exits with its code.

    A `UserError` is printed to stderr, exit code 2; a signal that ended a training gives 128 + its number. Any other
    exception keeps its traceback.
    """
    code = 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8; the default for stderr
    relax_gc()
    limit_kernel_caches()
    try:
        _run_and_print(main)
    except OSError as error:
        if not _stdout_is_gone():
            raise
        code = 128 + 13  # as if killed by SIGPIPE: the reader, such as `| head`, has closed the pipe
        if not isinstance(error, BrokenPipeError):
            print(f"error: the output cannot be written to stdout: {error.strerror}", file=sys.stderr)
            code = 2
    except UserError as error:
        _write_problems(error)
        # every process of a machine has the same message
        if is_local_main_process():
            print(error, file=sys.stderr)
        code = 2
    except Interrupted as stopped:
        if is_main_process():
            print(stopped, file=sys.stderr, flush=True)
        wait_for_everyone()  # a launcher kills the other processes once one has exited
        code = 128 + stopped.signum
    except KeyboardInterrupt as interrupt:
        way_on = str(interrupt) if is_main_process() else ""  # what to type to continue, from a training
        print(f"\ninterrupted. {way_on}" if way_on else "\ninterrupted", file=sys.stderr)
        code = 130
    exit_process(code)
    if code:
        sys.exit(code)


def _run_and_print(main: Callable[[], object]) -> None:
    """Runs `main` and flushes stdout, so that a closed pipe raises here and not while Python exits."""
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
    """Whether stdout cannot be written to any more; if so, the rest of the output is discarded."""
    if sys.stdout is None:
        return False
    try:
        print(flush=True)  # an unbuffered stdout has nothing to flush
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return True
    return False


def _write_problems(error: UserError) -> None:
    """Writes the problems as JSON to the file that a parent process named in `ERROR_FILE`."""
    if (file := os.environ.get(ERROR_FILE)) and is_local_main_process():
        with contextlib.suppress(OSError):  # the message is printed to stderr as well
            Path(file).write_text(json.dumps([asdict(problem) for problem in error.problems]), encoding="utf-8")
