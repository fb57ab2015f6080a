"""Changes to layers of PEFT and bitsandbytes, made on a loaded model or for the whole process."""


def show_head_bias(model) -> None:
    """Gives a head wrapped for trained token rows the `bias` that TRL's fused loss reads from it.

    PEFT's wrapper passes `weight` through, with the trained rows in it, and no other attribute.
    """
    from peft.utils.other import TrainableTokensWrapper

    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.register_parameter("bias", getattr(head.original_module, "bias", None))


def leave_casts_to_autocast() -> None:
    """Spares each adapter a float32 copy of its input, which autocast would only turn back: time, and a copy kept."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    def cast(layer, x, dtype):
        return x if x is None or torch.is_autocast_enabled(x.device.type) else x.to(dtype)

    BaseTunerLayer._cast_input_dtype = cast


def keep_quantised_weights(model) -> None:
    """Stops bitsandbytes from rewriting the weights at the first evaluation on a CPU.

    Its fast path for inference packs them anew, in place and with coarser scales, so the
    training that goes on after would be against another base.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
