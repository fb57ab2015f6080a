"""Weights: which type they are loaded in, which attention they use, how they are quantised."""

from loguru import logger

from utils.model.adapter import adapter_of, names_where
from utils.model.adapter_files import attach_adapter
from utils.model.base_config import refuse_unloadable
from utils.model.merge_layers import merge_onto
from utils.model.options import compute_dtype, quantisation_options, resolve_checkpointing
from utils.model.quantised import check_base, forget_unpacking, is_stored_in_bytes, loading_options, resolve_base
from utils.patches.attention import use_row_attention
from utils.patches.layers import keep_quantised_weights
from utils.patches.rope import use_row_rope
from utils.runtime.distributed import uses_fsdp, zero_stage
from utils.runtime.errors import UserError, load_failure, raise_if_any


def load_model(args, train_args):
    """Loads the base model for training.

    A model that is trained in full is loaded in float32, since an update is often too small
    for the 8 bits of a bf16 mantissa to show; the arithmetic is still `--precision`'s. Under an
    adapter the base never changes, so it is loaded in the precision of the arithmetic.

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument; its `gradient_checkpointing` None is decided here.

    Returns:
        transformers.PreTrainedModel

    Raises:
        UserError: the weights cannot be loaded, or are not safetensors.
    """
    import torch
    import transformers

    _settle_quantised_base(args, train_args)
    adapter, dtype = adapter_of(args), compute_dtype(args)
    options = {
        "dtype": dtype if adapter.is_adapter else torch.float32,
        "trust_remote_code": args.trust_remote_code,
        "use_safetensors": True,
    }
    if args.attn_implementation != "auto":
        options["attn_implementation"] = args.attn_implementation
    if adapter.quantised:
        options |= quantisation_options(dtype, train_args)
    saved = loading_options(args, dtype)
    options |= saved
    use_row_attention()
    if not adapter.is_adapter:
        refuse_unloadable(
            args.model_name_or_path, "--model_name_or_path", args.trust_remote_code, "use --train_mode lora"
        )
    auto_class = getattr(transformers, args.task.auto_class)
    try:
        model, info = auto_class.from_pretrained(args.model_name_or_path, output_loading_info=True, **options)
    except Exception as error:  # the hub, the file system and the model code each raise their own
        raise UserError(load_failure("model", "--model_name_or_path", args.model_name_or_path, error)) from error
    _refuse_incomplete(info, args.model_name_or_path)
    settle_generation(model)
    if saved:
        forget_unpacking(model)
    use_row_rope(model)
    if adapter.quantised:
        keep_quantised_weights(model)
    if args.attn_implementation == "auto":
        settle_attention(model, args.precision, train_args.device)
    _resolve_checkpointing(model, train_args)
    return with_trained_adapter(model, args) if args.adapter_name_or_path else model


def _settle_quantised_base(args, train_args) -> None:
    """A base from a hub is looked at here: its config.json is not on the machine when the arguments are checked."""
    raise_if_any(check_base(args, download=True))
    resolve_base(args, download=True)
    if is_stored_in_bytes(args) and (zero_stage(train_args) == 3 or train_args.fsdp or uses_fsdp()):
        raise UserError(
            f"--model_name_or_path {args.model_name_or_path!r} is saved in 4 bits, stored in bytes, which ZeRO-3 and "
            "FSDP cannot divide; use --deepspeed zero2, or give the model it was made from with --train_mode "
            f"{names_where(lambda row: row.quantised)}"
        )


def with_trained_adapter(model, args):
    """The model under an adapter that was trained before, to go on with; merged where every weight is trained.

    Raises:
        UserError: the adapter does not fit the base, or cannot be merged without changing the logits.
    """
    path, flag = args.adapter_name_or_path, "--adapter_name_or_path"
    if not adapter_of(args).is_adapter:
        return merge_onto(model, path, flag, None).model.requires_grad_(True)
    model = attach_adapter(model, path, flag, trainable=True)
    # where the base lies now, for whoever loads the run
    model.peft_config["default"].base_model_name_or_path = args.model_name_or_path
    return model


def settle_attention(model, precision: str, device) -> None:
    """Under `auto`: FlashAttention-2 (arXiv 2307.08691) where it can be had, else what transformers chose.

    Its kernels take rows that stand end to end as they are: transformers hands them the rows' lengths, from the
    collator or from positions that start again, so that no mask of tokens × tokens is made.

    Args:
        model: as loaded; only its configuration changes.
        precision: bf16, fp16 or fp32, of the arithmetic.
        device: torch.device of the training.
    """
    from transformers.utils import logging

    chosen, reason = model.config._attn_implementation, _no_flash_attention(model, precision, device)
    if reason is None:
        told = logging.get_verbosity()
        # it would warn of float32 weights, which autocast takes care of, and of a model that is not on the GPU yet
        logging.set_verbosity_error()
        try:
            model.set_attn_implementation("flash_attention_2")
        except Exception as error:  # a build that does not fit its torch raises whatever it likes
            reason = f"{type(error).__name__}: {error}"
            model.set_attn_implementation(chosen)
        finally:
            logging.set_verbosity(told)
    why = "" if reason is None else f" (no flash attention: {reason})"
    logger.info("attention is {}{}", model.config._attn_implementation, why)


def _no_flash_attention(model, precision: str, device) -> str | None:
    """Why FlashAttention-2 cannot be used; None where nothing speaks against it."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    known = getattr(model, "_compatible_flash_implementations", None)
    if device.type != "cuda":
        return "it needs a CUDA device"
    if not is_flash_attn_2_available():
        return "the package flash-attn is not installed"
    if precision == "fp32":
        return "its kernels are for bf16 and fp16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    able = model._supports_flash_attn and model._can_set_attn_implementation()
    if not able or (known is not None and "flash_attention_2" not in known):
        return f"{type(model).__name__} does not support it"
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"its heads have {head} dimensions, more than 256" if head > 256 else None


def settle_generation(model) -> None:
    """Some bases bring a temperature without saying that they sample, which transformers refuses to save."""
    config = model.generation_config
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}
    given = [name for name, neutral in sampling.items() if getattr(config, name, None) not in (None, neutral)]
    if given and not config.do_sample:
        config.do_sample = True
        logger.info("the base's generation_config sets {} without do_sample; it is saved with do_sample", given)


def _refuse_incomplete(info: dict, path: str) -> None:
    """Weights that the files do not hold would be random, which transformers only warns of."""
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        if info[key]:
            names = sorted(map(str, info[key]))
            raise UserError(
                f"--model_name_or_path {path!r} {what} {len(names)} of the weights that its config.json asks for, "
                f"such as {names[0]}; give a complete model"
            )
    if info["unexpected_keys"]:
        names = sorted(info["unexpected_keys"])
        logger.warning("{} weights in {} are not used by the model, such as {}", len(names), path, names[0])


def _resolve_checkpointing(model, train_args) -> None:
    # ZeRO-3 leaves each process a part, and the whole's size beside it
    size = max(model.num_parameters(), sum(getattr(weight, "ds_numel", 0) for weight in model.parameters()))
    if resolve_checkpointing(size, train_args):
        logger.info(
            "gradient checkpointing is {} for {:,} weights", "on" if train_args.gradient_checkpointing else "off", size
        )
