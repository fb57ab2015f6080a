"""Process-wide settings to make before torch is imported: kernel caches and garbage collection."""

import gc
import os

KERNEL_CACHE_SIZE = 64  # a step needs about 30: a forward and two backward products for each shape of weight


def limit_kernel_caches() -> None:
    """Limits the caches of compiled CPU kernels, unless the environment sets them; call before torch is imported.

    A kernel is compiled for every shape of a matrix product, and every step has another number of tokens. oneDNN and
    torch's own layer above it each cache 1,024 of them, gigabytes that are never used again.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNEL_CACHE_SIZE))


def relax_gc() -> None:
    """Makes garbage collection rare: during the import of torch it would run a hundred times and find nothing."""
    gc.set_threshold(100_000, 50, 100)
