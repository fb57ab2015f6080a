"""Ranks, launchers and collective operations of a distributed run."""

import contextlib
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from utils.runtime.log import is_main_process

_LOCK_GRACE_SECONDS = 0.2  # a lock that no process has open for so long is stale


def world_size() -> int:
    """Returns the number of processes that train together; 1 for plain `python`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_local_main_process() -> bool:
    """Whether this is the first process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def started_by_deepspeed() -> bool:
    """Whether DeepSpeed's launcher started this process; only it sets this variable."""
    return "CROSS_SIZE" in os.environ


def uses_fsdp() -> bool:
    """Whether accelerate's launcher turned FSDP on."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def set_single_process_env() -> None:
    """Sets the environment variables of a launcher in a process started by plain `python`, for DeepSpeed on one GPU."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def init_deepspeed() -> None:
    """Initialises DeepSpeed's process group before the weights load, which ZeRO-3 partitions then."""
    import deepspeed
    import torch

    remove_stale_build_locks()
    _log_first_build()
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else None
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)


def _build_root() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _log_first_build() -> None:
    if is_main_process() and not any(_build_root().glob("**/*.so")):
        from loguru import logger

        logger.info(
            "DeepSpeed compiles its operators at its first start, for minutes; it keeps them in {}", _build_root()
        )


def remove_stale_build_locks() -> None:
    """Removes build locks of killed compilers, on which torch would wait forever.

    torch has one lock file per C++ operator, which the compiling process holds open; a lock that no process has open
    is stale. It is checked twice, because torch closes a lock a moment before it removes it, and another process may
    create a new one of the same name in between.
    """
    from filelock import FileLock
    from loguru import logger

    root = _build_root()
    with FileLock(Path(tempfile.gettempdir()) / f"llm_dojo-{os.getuid()}-builds.lock"):
        before = _unheld_locks(root)
        if not before:
            return
        time.sleep(_LOCK_GRACE_SECONDS)
        for lock, identity in _unheld_locks(root).items():
            if before.get(lock) == identity:
                logger.warning("removed {}, a build lock of a process that no longer exists", lock)
                lock.unlink(missing_ok=True)


def _unheld_locks(root: Path) -> dict[Path, tuple[int, int]]:
    """Returns the locks below `root` that no process has open → (inode, change time), which identify each."""
    import psutil

    found = {}
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        with contextlib.suppress(FileNotFoundError):
            stat = lock.stat()
            found[lock] = stat.st_ino, stat.st_ctime_ns
    if not found:
        return {}
    held = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            held.update(Path(file.path) for file in process.open_files())
    return {lock: identity for lock, identity in found.items() if lock.resolve() not in held}


def broadcast_object(value: Any) -> Any:
    """Returns the first process's value on every process, all of which must call it; any picklable object."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values, from_process=0)
    return values[0]


def any_rank(flag: bool, device) -> bool:
    """Whether `flag` is set on any process; every process must call it."""
    if world_size() == 1:
        return flag
    import torch

    reduced = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(reduced, op=torch.distributed.ReduceOp.MAX)
    return bool(reduced.item())


def all_gather_objects(items: list) -> list:
    """Returns the concatenated lists of all processes, in rank order; every process must call it."""
    if world_size() == 1:
        return items
    import torch

    found: list[list] = [[]] * world_size()
    torch.distributed.all_gather_object(found, items)
    return [item for part in found for item in part]


def launcher_parent_pid() -> int | None:
    """Returns the process id of the `deepspeed` command, the parent of this process's launcher; None without one.

    That command does not pass SIGTERM on to the launcher, which would continue training; once it has died, the
    launcher has another parent and the returned number changes.
    """
    if not started_by_deepspeed():
        return None
    import psutil

    try:
        return psutil.Process(os.getppid()).ppid()
    except psutil.Error:
        return 1


def wait_for_everyone() -> None:
    """Blocks until every process has called it."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier()


def exit_process(code: int) -> None:
    """Exits one process of several immediately, with `code`; does nothing in a single process.

    `os._exit` skips Python's shutdown, in which threads of a process group sometimes abort after a successful run.
    """
    torch = sys.modules.get("torch")
    if world_size() == 1:
        return
    if code == 0 and torch is not None and torch.distributed.is_initialized():
        torch.distributed.barrier()  # no process may destroy the group while another uses it
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        remove_shared_memory(os.environ.get("MASTER_PORT", ""), os.environ.get("RANK", ""))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def remove_shared_memory(port: str, rank: str = "*") -> None:
    """Removes the shared-memory buffers of DeepSpeed's CPU all-reduce, 69 MB each, which it never frees."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_{rank}"):
        buffer.unlink(missing_ok=True)


def zero_stage(train_args) -> int:
    """Returns the ZeRO stage; 0 without DeepSpeed."""
    return train_args.deepspeed_plugin.zero_stage if train_args.deepspeed_plugin is not None else 0
