"""Imports PEFT and accelerate without bitsandbytes and DeepSpeed, which most runs do not use and which take seconds."""

import gc
import sys


def import_peft() -> None:
    """Imports PEFT, and transformers with it, without bitsandbytes, which only quantised weights need.

    PEFT 0.21 imports bitsandbytes wherever it is installed: once to see which layers it has, and again for every layer
    that gets an adapter, to see whether it is quantised.
    """
    if "peft" in sys.modules:
        return
    absent = "bitsandbytes" not in sys.modules
    if absent:
        sys.modules["bitsandbytes"] = None  # the import fails, as where it is not installed
    try:
        import peft.tuners.lora.model as lora
    finally:
        if absent:
            del sys.modules["bitsandbytes"]
    gc.freeze()  # imported modules are never freed; later collections need not visit their million objects
    # a model with quantised layers has imported bitsandbytes already
    lora.is_bnb_available = lora.is_bnb_4bit_available = lambda: "bitsandbytes" in sys.modules


def skip_deepspeed_import() -> None:
    """Stops accelerate from importing DeepSpeed in a run without it.

    accelerate 1.15 imports it in `extract_model_from_parallel`, at the first checkpoint, to see whether the model is
    a DeepSpeed engine.
    """
    import accelerate.utils.other

    accelerate.utils.other.is_deepspeed_available = lambda: False
