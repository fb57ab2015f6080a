"""What is settled before the libraries are imported; those that have no part in most runs would cost seconds."""

import gc
import os
import sys

KERNELS_KEPT = 64  # a step needs some 30: a forward and two backward products for each shape of weight


def limit_kernel_caches() -> None:
    """Has the CPU forget the kernels of earlier steps, unless the environment says otherwise; before torch is imported.

    A kernel is compiled for every shape of a matrix product, and every step has another number of tokens. oneDNN and
    torch's own layer above it each keep the last 1,024, of which none is needed again: gigabytes.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS_KEPT))


def import_seldom_collecting() -> None:
    """Has the garbage collector look seldom: while torch is imported it would a hundred times, and find nothing."""
    gc.set_threshold(100_000, 50, 100)


def import_peft() -> None:
    """Imports PEFT, and transformers with it, without bitsandbytes, which only quantised weights need."""
    if "peft" in sys.modules:
        return
    absent = "bitsandbytes" not in sys.modules
    if absent:
        sys.modules["bitsandbytes"] = None  # importing it fails, which PEFT takes
    try:
        import peft.import_utils
        import peft.tuners.lora.model as lora
        from transformers.utils import import_utils
    finally:
        if absent:
            del sys.modules["bitsandbytes"]
    for asked in (peft.import_utils.is_bnb_available, import_utils.is_bitsandbytes_available):
        asked.cache_clear()
    gc.freeze()  # what is imported stays; each later collection would look at a million objects for nothing
    # PEFT would import it to see whether a layer is quantised; what is has imported it
    lora.is_bnb_available = lora.is_bnb_4bit_available = lambda: "bitsandbytes" in sys.modules


def leave_deepspeed_out() -> None:
    """Without its launcher DeepSpeed has no part in a run, yet accelerate would import it."""
    import accelerate.utils.other

    accelerate.utils.other.is_deepspeed_available = lambda: False
