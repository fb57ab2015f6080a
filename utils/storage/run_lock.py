"""Locks that allow one writer at a time for a folder or a file; the operating system frees them when a process dies.

The lock lies on a small hidden file that says who holds it; the file alone, left by a process that was killed, locks
nothing. On a network file system it holds between machines where that file system has locks (NFS does); where it has
none, a warning says so.
"""

import atexit
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loguru import logger

from utils.runtime.errors import UserError

RUN_LOCK = ".run.lock"  # in a run's folder while it trains
_held: dict[str, int] = {}  # of this process: path → descriptor


def run_lock_path(folder: str | Path) -> Path:
    """Returns the lock file of a run's folder."""
    return Path(folder) / RUN_LOCK


def lock_path_for(path: str | Path) -> Path:
    """Returns the lock file of a file, or of a folder that is replaced: next to it."""
    real = Path(path).expanduser().resolve()
    return real.with_name(f".{real.name}.lock")


def lock_holder(lock: Path) -> str | None:
    """Returns which other process holds a lock, `"process 4711 on gpu-7, since 2026-01-01 12:00:00"`, or None."""
    if str(lock.resolve()) in _held:
        return None
    try:
        with open(lock, "rb+") as file:
            return None if _try(file.fileno(), fcntl.LOCK_SH) else _owner(file.read())
    except OSError:
        return None  # there is none, or it may not be opened


def acquire(lock: Path, flag: str) -> None:
    """Acquires a lock, held until this process ends or calls `release`.

    Args:
        lock: its file.
        flag: what it is for, for the message: the flag with its value.

    Raises:
        UserError: another process has it.
        OSError: the file cannot be written.
    """
    name = str(lock.resolve())
    if name in _held:
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(3):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            free = _try(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            os.close(descriptor)
            lock.unlink(missing_ok=True)
            logger.warning("{} has no locks ({}); see that nothing else writes there", lock.parent, error.strerror)
            return
        if free and _is_still(lock, descriptor):
            break
        owner = _owner(os.read(descriptor, 4096))
        os.close(descriptor)
        if attempt == 2:
            raise UserError(in_use_message(flag, owner))
        time.sleep(0.1)  # it was only looked at, or the one who had it has just removed the file
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}).encode())
    if not _held:
        atexit.register(release_all)
    _held[name] = descriptor


def in_use_message(flag: str, owner: str) -> str:
    """Returns the message for a path that another process writes to."""
    return f"{flag} is in use by {owner}; wait for it to end, stop it, or give another place"


def release(lock: Path) -> None:
    """Releases a lock and removes its file; does nothing if this process does not hold it."""
    descriptor = _held.pop(str(lock.resolve()), None)
    if descriptor is not None:
        if _is_still(lock, descriptor):
            lock.unlink(missing_ok=True)  # while it is held, so that nobody waits on a file that is gone
        os.close(descriptor)


@contextmanager
def hold_lock(lock: Path, flag: str) -> Iterator[None]:
    """Holds a lock for a block; see `acquire`."""
    acquire(lock, flag)
    try:
        yield
    finally:
        release(lock)


def release_all() -> None:
    """Releases every lock of this process."""
    for name in list(_held):
        release(Path(name))


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(lock: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(lock), os.fstat(descriptor))
    except OSError:
        return False


def _owner(content: bytes) -> str:
    try:
        noted = json.loads(content)
        return f"process {noted['pid']} on {noted['host']}, since {noted['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
