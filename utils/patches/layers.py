"""Workarounds for layers of PEFT and bitsandbytes, applied to a loaded model or to the class."""


def show_head_bias(model) -> None:
    """Adds the attribute `bias` to a head that PEFT wrapped to train single token rows.

    TRL 1.16's fused loss reads `weight` and `bias` of the head; PEFT 0.21's wrapper passes on only `weight`, with the
    trained rows in it.
    """
    from peft.utils.other import TrainableTokensWrapper

    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.register_parameter("bias", getattr(head.original_module, "bias", None))


def leave_casts_to_autocast() -> None:
    """Leaves the dtype of an adapter's input to autocast, where that is on.

    PEFT 0.21 casts the input to the adapter's float32 first, and autocast casts it back to bf16 for the product: two
    copies, one of which is kept for the backward pass.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    def cast(self, x, dtype):
        return x if x is None or torch.is_autocast_enabled(x.device.type) else x.to(dtype)

    BaseTunerLayer._cast_input_dtype = cast


def keep_quantised_weights(model) -> None:
    """Stops bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU.

    In bitsandbytes 0.50 the fast path for inference on a CPU with AVX-512 BF16 repacks them in place, with coarser
    scales, so that a training would continue on another base.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
