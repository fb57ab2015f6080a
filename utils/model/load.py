"""Loads the base model for training: dtype, quantisation, attention, gradient checkpointing."""

from loguru import logger

from utils.model.adapter import adapter_of, names_where
from utils.model.adapter_files import attach_adapter
from utils.model.base_config import refuse_unloadable
from utils.model.merge_layers import merge_onto
from utils.model.meta import whole_models
from utils.model.new_tokens import extend_model, extend_tokenizer, new_tokens
from utils.model.options import compute_dtype, quantisation_options, resolve_checkpointing
from utils.model.quantised import check_base, forget_unpacking, is_stored_in_bytes, loading_options, resolve_base
from utils.model.rope import scaling_options
from utils.model.tokenizer import load_tokenizer
from utils.patches.attention import use_row_attention
from utils.patches.layers import keep_quantised_weights
from utils.patches.rope import use_row_rope
from utils.runtime.distributed import uses_fsdp, world_size, zero_stage
from utils.runtime.errors import UserError, load_failure, raise_if_any


def load_model(args, train_args):
    """Loads the base model for training.

    Full training loads the weights in float32, because most updates are too small to change a bf16 weight, whose
    mantissa has 8 bits; the forward pass still runs in `--precision`. An adapter's base never changes, so it is loaded
    in the precision of the forward pass.

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument; its `gradient_checkpointing` None is replaced by a choice.

    Returns:
        transformers.PreTrainedModel, or peft.PeftModel with `--adapter_name_or_path`

    Raises:
        UserError: the weights cannot be loaded, or are not safetensors.
    """
    if train_args.fsdp and world_size() == 1:
        raise UserError("--fsdp shards over several processes, and there is one; start it with torchrun")
    _resolve_quantised_base(args, train_args)
    adapter = adapter_of(args)
    quantised = loading_options(args, compute_dtype(args))
    use_row_attention()
    if not adapter.is_adapter:
        refuse_unloadable(
            args.model_name_or_path, "--model_name_or_path", args.trust_remote_code, "use --train_mode lora"
        )
    with whole_models(train_args):
        scaling = scaling_options(args.model_name_or_path, args.rope_scaling, args.trust_remote_code)
    model = _from_pretrained(args, _options(args, train_args) | quantised | scaling)
    if args.add_tokens:
        _add_tokens(model, args)
    fix_generation_config(model)
    if quantised:
        forget_unpacking(model)
    use_row_rope(model)
    if adapter.quantised:
        keep_quantised_weights(model)
    if args.attn_implementation == "auto":
        resolve_attention(model, args.precision, train_args.device)
    _resolve_checkpointing(model, train_args)
    return with_trained_adapter(model, args) if args.adapter_name_or_path else model


def _add_tokens(model, args) -> None:
    tokenizer, tokens = load_tokenizer(args.model_name_or_path, args.trust_remote_code), new_tokens(args)
    extend_tokenizer(tokenizer, tokens)
    extend_model(model, tokenizer, tokens)


def _options(args, train_args) -> dict:
    """The arguments of `from_pretrained` for a base that is not saved quantised."""
    import torch

    adapter, dtype = adapter_of(args), compute_dtype(args)
    options = {
        "dtype": dtype if adapter.is_adapter else torch.float32,
        "trust_remote_code": args.trust_remote_code,
        "use_safetensors": True,
    }
    if args.attn_implementation != "auto":
        options["attn_implementation"] = args.attn_implementation
    return options | quantisation_options(dtype, train_args) if adapter.quantised else options


def _from_pretrained(args, options: dict):
    """Loads the task's kind of model; a base with missing weights is refused."""
    import transformers

    auto_class = getattr(transformers, args.task.auto_class)
    try:
        model, info = auto_class.from_pretrained(args.model_name_or_path, output_loading_info=True, **options)
    except Exception as error:  # the hub, the file system and the model code each raise their own
        raise UserError(load_failure("model", "--model_name_or_path", args.model_name_or_path, error)) from error
    _refuse_incomplete(info, args.model_name_or_path)
    return model


def _resolve_quantised_base(args, train_args) -> None:
    """Checks the base again: the arguments are checked before a Hub model's config.json is downloaded."""
    raise_if_any(check_base(args, download=True))
    resolve_base(args, download=True)
    if is_stored_in_bytes(args) and (zero_stage(train_args) == 3 or train_args.fsdp or uses_fsdp()):
        raise UserError(
            f"--model_name_or_path {args.model_name_or_path!r} is saved in 4 bits, stored in bytes, which ZeRO-3 and "
            "FSDP cannot divide; use --deepspeed zero2, or give the model it was made from with --train_mode "
            f"{names_where(lambda row: row.quantised)}"
        )


def with_trained_adapter(model, args):
    """Adds a trained adapter to continue training it; full training merges it into the weights instead.

    Raises:
        UserError: the adapter does not fit the base, or cannot be merged without changing the logits.
    """
    path, flag = args.adapter_name_or_path, "--adapter_name_or_path"
    if not adapter_of(args).is_adapter:
        return merge_onto(model, path, flag, None).model.requires_grad_(True)
    model = attach_adapter(model, path, flag, trainable=True)
    # the base may have moved since that adapter was trained
    model.peft_config["default"].base_model_name_or_path = args.model_name_or_path
    return model


def resolve_attention(model, precision: str, device) -> None:
    """Selects FlashAttention-2 (arXiv 2307.08691) if model, GPU and precision support it.

    Its kernels compute concatenated rows without a mask of tokens × tokens: transformers passes them the rows' lengths,
    from the collator or from position ids that start again at 0.

    Args:
        model: as loaded; only its configuration changes.
        precision: of the forward pass: bf16, fp16 or fp32.
        device: torch.device of the training.
    """
    from transformers.utils import logging

    chosen, reason = model.config._attn_implementation, _no_flash_attention(model, precision, device)
    if reason is None:
        verbosity = logging.get_verbosity()
        # it would warn of float32 weights, which autocast casts, and of a model that is not on the GPU yet
        logging.set_verbosity_error()
        try:
            model.set_attn_implementation("flash_attention_2")
        except Exception as error:  # a build for another torch may raise anything
            reason = f"{type(error).__name__}: {error}"
            model.set_attn_implementation(chosen)
        finally:
            logging.set_verbosity(verbosity)
    why = "" if reason is None else f" (no flash attention: {reason})"
    logger.info("attention is {}{}", model.config._attn_implementation, why)


def _no_flash_attention(model, precision: str, device) -> str | None:
    """Why FlashAttention-2 cannot be used; None if it can."""
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
    supported = model._supports_flash_attn and model._can_set_attn_implementation()
    if not supported or (known is not None and "flash_attention_2" not in known):
        return f"{type(model).__name__} does not support it"
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"its heads have {head} dimensions, more than 256" if head > 256 else None


def fix_generation_config(model) -> None:
    """Sets `do_sample` if the base's generation config has a temperature or the like without it.

    transformers 5 refuses to save such a configuration.
    """
    config = model.generation_config
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}
    given = [name for name, neutral in sampling.items() if getattr(config, name, None) not in (None, neutral)]
    if given and not config.do_sample:
        config.do_sample = True
        logger.info("the base's generation_config sets {} without do_sample; it is saved with do_sample", given)


def _refuse_incomplete(info: dict, path: str) -> None:
    """Refuses weights that the files lack: transformers 5.23 would initialise them at random, and only warn."""
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
    # ZeRO-3 shards weights when they load; the full size of each is in ds_numel
    size = max(model.num_parameters(), sum(getattr(weight, "ds_numel", 0) for weight in model.parameters()))
    if resolve_checkpointing(size, train_args):
        logger.info(
            "gradient checkpointing is {} for {:,} weights", "on" if train_args.gradient_checkpointing else "off", size
        )
