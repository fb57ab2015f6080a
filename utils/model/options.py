"""How a model is loaded and run: its type, 4-bit quantisation, gradient checkpointing."""

from utils.runtime.distributed import uses_fsdp

CHECKPOINTING_FROM = 1_000_000_000  # weights; below, activations are small beside what recomputing them costs


def quantisation_options(compute_dtype, train_args) -> dict:
    """The base in 4 bits: NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3)."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    if train_args.deepspeed_plugin is not None or train_args.fsdp or uses_fsdp():
        # sharding splits storage of a floating type only, and places the weights by itself
        config.bnb_4bit_quant_storage = compute_dtype
        return {"quantization_config": config}
    # quantised weights cannot be moved later, so each process loads them where it trains
    return {"quantization_config": config, "device_map": {"": train_args.device}}


def resolve_checkpointing(size: int, train_args) -> bool:
    """Turns gradient checkpointing on for a model of so many weights, or off; returns whether that was left open."""
    if train_args.gradient_checkpointing is not None:
        return False
    # two names of one thing in transformers; the second is the newer
    train_args.gradient_checkpointing = train_args.activation_checkpointing = size >= CHECKPOINTING_FROM
    return True


def compute_dtype(args):
    """The type of the arithmetic.

    Args:
        args: CommonArgs, `precision` settled.
    """
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]


def uses_checkpointing(train_args, weights: int) -> bool:
    """Whether a run recomputes activations: as asked, else by the model's size."""
    asked = train_args.gradient_checkpointing
    return weights >= CHECKPOINTING_FROM if asked is None else asked
