"""Imports of PEFT and accelerate without the libraries that a run does not use."""

import gc
import sys


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


def skip_deepspeed_import() -> None:
    """Without its launcher DeepSpeed has no part in a run, yet accelerate would import it."""
    import accelerate.utils.other

    accelerate.utils.other.is_deepspeed_available = lambda: False
