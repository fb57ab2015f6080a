"""Weights: which type they are loaded in, which attention they use, how they are quantised."""

from loguru import logger

from utils.adapter import ADAPTERS
from utils.attention import use_row_attention
from utils.errors import UserError
from utils.launch import uses_fsdp
from utils.tokenizer import load_failure

CHECKPOINTING_FROM = 1_000_000_000  # weights; below, activations are small beside what recomputing them costs


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
    from transformers import AutoModelForCausalLM

    adapter = ADAPTERS[args.train_mode]
    compute_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
    options = {
        "dtype": compute_dtype if adapter.lora else torch.float32,
        "trust_remote_code": args.trust_remote_code,
        "use_safetensors": True,
    }
    if args.attn_implementation != "auto":
        options["attn_implementation"] = args.attn_implementation
    if adapter.quantised:
        options |= quantised(compute_dtype, train_args)
    use_row_attention()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, output_loading_info=True, **options)
    except Exception as error:  # the hub, the file system and the model code each raise their own
        raise UserError(load_failure("model", "--model_name_or_path", args.model_name_or_path, error)) from error
    _refuse_incomplete(info, args.model_name_or_path)
    settle_generation(model)
    if adapter.quantised:
        _keep_quantised_weights(model)
    _settle_checkpointing(model, train_args)
    return with_trained_adapter(model, args) if args.adapter_name_or_path else model


def with_trained_adapter(model, args):
    """The model under an adapter that was trained before, to go on with; merged where every weight is trained."""
    from peft import PeftModel

    path, lora = args.adapter_name_or_path, ADAPTERS[args.train_mode].lora
    try:
        model = PeftModel.from_pretrained(model, path, is_trainable=lora)
    except Exception as error:  # a base of another shape, a damaged file, the hub
        raise UserError(load_failure("adapter", "--adapter_name_or_path", path, error)) from error
    # where the base lies now, for whoever loads the run
    model.peft_config["default"].base_model_name_or_path = args.model_name_or_path
    return model if lora else model.merge_and_unload().requires_grad_(True)


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


def quantised(compute_dtype, train_args) -> dict:
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


def _keep_quantised_weights(model) -> None:
    """Stops bitsandbytes from rewriting the weights at the first evaluation on a CPU.

    Its fast path for inference packs them anew, in place and with coarser scales, so the
    training that goes on after would be against another base.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _settle_checkpointing(model, train_args) -> None:
    if train_args.gradient_checkpointing is None:
        # ZeRO-3 leaves each process a part, and the whole's size beside it
        size = max(model.num_parameters(), sum(getattr(weight, "ds_numel", 0) for weight in model.parameters()))
        wanted = size >= CHECKPOINTING_FROM
        # two names of one thing in transformers; the second is the newer
        train_args.gradient_checkpointing = train_args.activation_checkpointing = wanted
        logger.info("gradient checkpointing is {} for {:,} weights", "on" if wanted else "off", size)
