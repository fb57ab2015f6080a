"""Starts Python programs whose libraries are imported already: each runs in a fork of a process that has them.

`python main_train.py` imports torch, transformers, TRL and PEFT for seconds, and every process of a launcher does so
again. `fast_python()` is the path of a command that takes Python's arguments and saves that time; the fixture
`fast_processes` makes it a test's `sys.executable`. The program is a process of its own, with the command's arguments,
working directory, environment, standard streams and exit code; `sys.executable` in it is the same command, so that
launchers start their processes in the same way. The command forwards the signals that it gets, also those to its
process group. Processes that the program starts do not get these: it has a session of its own, since a process cannot
enter another's.

Not for what happens before or during imports (startup, OMP_NUM_THREADS): start `PYTHON` there.
"""

import atexit
import contextlib
import functools
import gc
import json
import multiprocessing.spawn  # noqa: F401  # it keeps the `sys.executable` of its import, and hands open files on to it
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
LAUNCHERS = ("accelerate", "deepspeed", "torchrun")
# what a run of main_train.py imports, in its order
LIBRARIES = (
    "datasets", "transformers.trainer", "transformers.models.qwen2.modeling_qwen2", "accelerate",
    "peft.utils.transformers_weight_conversion", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer",
    "matplotlib.backends.backend_agg", "matplotlib.pyplot", "torch.utils.tensorboard", "multiprocess.spawn",
)  # fmt: skip


def can_fork() -> bool:
    """Whether the system can tell when a forked process ends; else `fast_python` is Python itself."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


@functools.cache
def fast_python() -> str:
    """Returns the path of a command that runs a Python program in a fork of a server, started by the first call.

    Beside it are the launchers, which start their processes by it.
    """
    if not can_fork():
        return PYTHON
    folder = Path(tempfile.mkdtemp(prefix="dojo-fork-"))
    command, address = folder / "python", folder / "socket"
    client = [PYTHON, "-IS", str(Path(__file__).with_name("fork_client.py")), str(address), str(command), PYTHON]
    _write_script(command, client)
    for program in Path(PYTHON).parent.iterdir():
        if program.name in LAUNCHERS:
            _write_script(folder / program.name, [str(command), str(program)])
        elif not program.name.startswith("python"):
            (folder / program.name).symlink_to(program)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    errors = os.dup(2)
    server = subprocess.Popen(
        [PYTHON, "-P", __file__, str(listener.fileno()), str(errors)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,  # streams that cannot seek
        pass_fds=[listener.fileno(), errors], cwd=folder, start_new_session=True,  # Ctrl+C is for its clients
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    listener.close()
    os.close(errors)
    atexit.register(_stop, server, folder)
    return str(command)


def _write_script(path: Path, words: list[str]) -> None:
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    path.chmod(0o700)


def _stop(server: subprocess.Popen, folder: Path) -> None:
    server.stdin.close()
    server.wait()
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def fast_processes():
    """Makes `sys.executable`, and the launchers beside it, those of `fast_python`."""
    before, sys.executable = sys.executable, fast_python()
    try:
        yield
    finally:
        sys.executable = before


class Server:
    """Forks for each client of a socket, until stdin is closed."""

    def __init__(self, listener: socket.socket):
        self.listener, self.selector = listener, selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ, self._end)
        self.selector.register(listener, selectors.EVENT_READ, self._accept)
        self.running: dict[int, tuple[socket.socket, int]] = {}  # process id → its client and pidfd

    def serve(self) -> dict:
        """Returns in each forked process, with its request."""
        while True:
            for key, _ in self.selector.select():
                if (request := key.data()) is not None:
                    return request

    def _accept(self) -> dict | None:
        client, _ = self.listener.accept()
        streams: list[int] = []
        try:
            request = _receive(client, streams)
            pid = os.fork()
        except (OSError, ValueError):  # the client was killed, or there can be no more processes
            client.close()
            return None
        else:
            if pid == 0:
                os.setsid()
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                self._close(client)
                return request
        finally:
            for stream in streams:
                os.close(stream)
        ended = os.pidfd_open(pid)
        self.running[pid] = client, ended
        self.selector.register(ended, selectors.EVENT_READ, functools.partial(self._reap, pid))
        self.selector.register(client, selectors.EVENT_READ, functools.partial(self._kill, pid))
        with contextlib.suppress(OSError):  # the client was killed: its socket is at its end, so `_kill` comes next
            client.sendall(f"{pid}\n".encode())
        return None

    def _close(self, client: socket.socket) -> None:
        """Closes what a forked process has of the server's: it would keep other clients' sockets open."""
        self.selector.close()
        self.listener.close()
        client.close()
        for other, ended in self.running.values():
            other.close()
            os.close(ended)

    def _reap(self, pid: int) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        client, ended = self.running.pop(pid)
        self.selector.unregister(ended)
        os.close(ended)
        with contextlib.suppress(KeyError):
            self.selector.unregister(client)
        with contextlib.suppress(OSError):
            client.sendall(f"{code}\n".encode())
        client.close()

    def _kill(self, pid: int) -> None:
        """Kills the program of a client that was killed."""
        if pid in self.running:  # else both ended at once, and `_reap` came first
            self.selector.unregister(self.running[pid][0])
            os.kill(pid, signal.SIGKILL)

    def _end(self) -> None:
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
        sys.exit()


def _receive(client: socket.socket, streams: list[int]) -> dict:
    """Reads the request of a client, and appends its standard streams to `streams`.

    Raises:
        OSError, ValueError: the client ended before the whole request was sent.
    """
    header, received, _, _ = socket.recv_fds(client, 8, 3)
    streams += received
    with client.makefile("rb") as reader:
        return json.loads(reader.read(int.from_bytes(header, "big")))


def import_libraries() -> None:
    """Imports what a run does, as it does; this project's own modules are forgotten again."""
    sys.path.insert(0, str(ROOT))
    from utils.patches.lazy_imports import import_peft
    from utils.runtime.startup import limit_kernel_caches, relax_gc

    relax_gc()
    limit_kernel_caches()
    import_peft()
    for name in LIBRARIES:
        __import__(name)
    sys.path.remove(str(ROOT))
    for name in [name for name in sys.modules if name.partition(".")[0] == "utils"]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()


def run(request: dict) -> None:
    """Runs a program as Python does."""
    kind, *words = request["program"]
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.executable = request["command"]
    if request["flags"] or os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    sys.orig_argv = [sys.executable, *request["flags"], *request["program"]]
    paths = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:0] = paths
    if any(Path(path, "sitecustomize.py").is_file() for path in paths):
        sys.modules.pop("sitecustomize", None)
        __import__("sitecustomize")
    sys.path.insert(0, {"-m": request["cwd"], "-c": ""}.get(kind, str(Path(kind).resolve().parent)))
    if kind == "-m":
        sys.argv = ["-m", *words[1:]]
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if kind == "-c":
        sys.argv, code = ["-c", *words[1:]], compile(words[0], "<string>", "exec")
    else:
        sys.argv, main.__file__ = [kind, *words], kind
        code = compile(Path(kind).read_bytes(), kind, "exec")
    exec(code, vars(main))


def finish(program: Callable[[], None]) -> None:
    """Runs a program and ends this process as Python would, but for freeing the memory, which takes a second."""
    code: int | str | None = 0
    try:
        program()
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    os.dup2(int(sys.argv[2]), 2)
    listening = socket.socket(fileno=int(sys.argv[1]))
    import_libraries()
    request = Server(listening).serve()
    finish(lambda: run(request))
