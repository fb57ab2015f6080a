"""Runs a function on all rows of some files, a chunk at a time, in several processes where that pays.

The first process reads the files and receives the results in order; only a few chunks are in memory at a time.
"""

import gc
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from utils.data.files import RawRow, count_rows, raw_rows
from utils.runtime.errors import UserError

CHUNK_SIZE = 1000  # rows
_DELAY = 1  # seconds after which the progress bar is shown
BYTES_PER_WORKER = 2 << 20  # of the files; less than that does not repay the start of another process


class Chunk(NamedTuple):
    """Consecutive rows of one file.

    Attributes:
        number: the index of the file among the files.
        check_only: whether the rows are only checked, since an earlier row stops the run already.
    """

    number: int
    file: str
    rows: list[RawRow]
    check_only: bool = False


def map_chunks(
    work: Callable[[Chunk], Any],
    files: list[str],
    workers: int | None,
    description: str | None,
    check_only: Callable[[], bool] = lambda: False,
) -> Iterator[Any]:
    """Yields `work(chunk)` for every chunk, in the files' order, with a progress bar on a terminal where it takes long.

    Args:
        work: chunk → result.
        files: paths of data files.
        workers: processes; None for `default_workers`.
        description: label of the progress bar; None for no bar.
        check_only: called for each chunk, sets its `check_only`.

    Raises:
        UserError: a process was killed.
    """
    from tqdm import tqdm

    sizes: deque[int] = deque()

    def chunks() -> Iterator[Chunk]:
        for number, file in enumerate(files):
            rows = iter(raw_rows(file))
            while some := list(islice(rows, CHUNK_SIZE)):
                sizes.append(len(some))
                yield Chunk(number, file, some, check_only())

    workers = default_workers(files) if workers is None else workers
    # a generator instead of `map`: a StopIteration raised by `work` would silently end a `map` and lose rows
    results = _map_in_processes(work, chunks(), workers) if workers > 1 else (work(chunk) for chunk in chunks())
    total = count_rows(files)
    few = total is not None and total < 5 * CHUNK_SIZE
    hidden = description is None or few or None  # None: tqdm shows it on a terminal only, as a file keeps every state
    bar = tqdm(total=total, unit=" rows", desc=description, disable=hidden, leave=False, delay=_DELAY)
    with closing(results), bar:
        for result in results:
            bar.update(sizes.popleft())
            yield result


def default_workers(files: list[str]) -> int:
    """The number of processes that the size of the files justifies; at most 16 and the number of cores."""
    size = sum(Path(file).stat().st_size for file in files)
    return min(os.cpu_count() or 1, 16, size // BYTES_PER_WORKER)


def _map_in_processes(work: Callable[[Chunk], Any], chunks: Iterator[Chunk], workers: int) -> Iterator[Any]:
    """As `map(work, chunks)`, in `workers` processes, reading a few chunks ahead.

    Raises:
        UserError: a process was killed.
    """
    import multiprocessing

    context = multiprocessing.get_context("fork")  # a forked process needs no copy of template and tokenizer
    pool = ProcessPoolExecutor(workers, context, initializer=_init_worker, initargs=(work,))
    pending: deque = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_run_work, chunk))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenises was killed, most likely because memory ran out; pass --dataset_num_proc 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Chunk], Any] | None = None  # set in each worker process


def _init_worker(work: Callable[[Chunk], Any]) -> None:
    global _work
    _work = work
    gc.freeze()  # the collector would walk through, and so copy, all that this process shares with the first one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the first process handles Ctrl-C
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Ends a worker whose parent was killed; it would wait for its next chunk forever."""
    while os.getppid() == parent:
        threading.Event().wait(0.5)
    os._exit(1)


def _run_work(chunk: Chunk) -> Any:
    return _work(chunk)
