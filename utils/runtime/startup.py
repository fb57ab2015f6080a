"""What is settled before the libraries are imported; those that have no part in most runs would cost seconds."""

import gc
import os

KERNEL_CACHE_SIZE = 64  # a step needs some 30: a forward and two backward products for each shape of weight


def limit_kernel_caches() -> None:
    """Has the CPU forget the kernels of earlier steps, unless the environment says otherwise; before torch is imported.

    A kernel is compiled for every shape of a matrix product, and every step has another number of tokens. oneDNN and
    torch's own layer above it each keep the last 1,024, of which none is needed again: gigabytes.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNEL_CACHE_SIZE))


def relax_gc() -> None:
    """Has the garbage collector look seldom: while torch is imported it would a hundred times, and find nothing."""
    gc.set_threshold(100_000, 50, 100)
