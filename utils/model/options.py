"""Options of loading and running a model: dtype, 4-bit quantisation, gradient checkpointing."""

from utils.runtime.distributed import uses_fsdp

CHECKPOINTING_FROM = 1_000_000_000  # weights; smaller models have small activations, which are not worth recomputing


def quantisation_options(compute_dtype, train_args) -> dict:
    """The arguments of `from_pretrained` for NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3)."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    if train_args.deepspeed_plugin is not None or train_args.fsdp or uses_fsdp():
        # DeepSpeed and FSDP shard only floating-point storage, and place the weights themselves
        config.bnb_4bit_quant_storage = compute_dtype
        return {"quantization_config": config}
    # quantised weights cannot be moved later, so each process loads them where it trains
    return {"quantization_config": config, "device_map": {"": train_args.device}}


def resolve_checkpointing(size: int, train_args) -> bool:
    """Decides on gradient checkpointing by the number of weights, if it is not set; returns whether it decided."""
    if train_args.gradient_checkpointing is not None:
        return False
    # transformers 5.23 has both names, of which the second is the new one
    train_args.gradient_checkpointing = train_args.activation_checkpointing = size >= CHECKPOINTING_FROM
    return True


def compute_dtype(args):
    """The dtype of the computation.

    Args:
        args: CommonArgs, with `precision` resolved.
    """
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]


def uses_checkpointing(train_args, weights: int) -> bool:
    """Whether a run recomputes activations: as set, else by the number of weights."""
    given = train_args.gradient_checkpointing
    return weights >= CHECKPOINTING_FROM if given is None else given
