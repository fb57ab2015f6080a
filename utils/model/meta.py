"""The model of a run without its weights, on the meta device: its shapes, its types and what is trained."""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from utils.model.adapter import adapter_of, build_adapter, new_config, saved_config
from utils.model.base_config import load_config
from utils.model.expert_targets import freeze_constants
from utils.model.new_tokens import new_tokens, resize_embeddings
from utils.model.options import compute_dtype, quantisation_options
from utils.model.quantised import quantisation_of
from utils.runtime.errors import UserError, load_failure


def without_weights(
    path: str, trust_remote_code: bool, config=None, auto_class: str = "AutoModelForCausalLM", **options
):
    """Builds the model that a config.json asks for on the meta device: every shape, and not one weight.

    The random numbers of the run stay as they were.

    Args:
        path: a folder, or a hub's name.
        trust_remote_code: whether Python code beside the model may run.
        config: to read it no second time.
        auto_class: of transformers, as a task names it.
        **options: for `from_config`.

    Raises:
        UserError: there is no such model.
    """
    import torch
    import transformers

    config = config or load_config(path, trust_remote_code)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return getattr(transformers, auto_class).from_config(config, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # the hub, and each model's code, raise their own
        raise UserError(load_failure("model", "--model_name_or_path", path, error)) from error


@contextlib.contextmanager
def whole_models(train_args):
    """Lets models be created without ZeRO-3's sharding, which transformers applies while it is configured."""
    config = getattr(train_args, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def meta_model(args, train_args, laid_out: bool, config=None, log: bool = False):
    """Builds what the trainer would have, adapters included, without memory for a single weight.

    Args:
        args: CommonArgs; of `train_special_tokens` only `on` counts, `auto` needs the weights.
        train_args: the recipe's TrainArgument.
        laid_out: whether DeepSpeed lays the weights out, which wants all of them in one type.
        config: from `load_config`, to read it once for several models.
        log: whether to log which parts are not trained.

    Returns:
        transformers.PreTrainedModel, or peft.PeftModel around it, on the meta device.

    Raises:
        UserError: the configuration, or `--lora_target_modules`, fits no model.
    """
    import torch
    from peft import get_peft_model

    dtype = compute_dtype(args)
    model = meta_base(args, train_args, config)
    adapter = _adapter(args, model, log)
    if adapter is not None:
        with torch.device("meta"), _shapes_of_quantised_weights():
            model = get_peft_model(model, adapter)
        freeze_constants(model)
    for parameter in model.parameters():
        if laid_out and args.precision != "fp32" and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
        elif parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def meta_base(args, train_args, config=None):
    """The base alone, as `load_model` would have it: quantised where the run's is."""
    import torch

    kind, dtype = adapter_of(args), compute_dtype(args)
    options = {} if args.attn_implementation in ("auto", "flash_attention_2") else {
        "attn_implementation": args.attn_implementation
    }  # fmt: skip
    options["dtype"] = dtype if kind.is_adapter else torch.float32
    config = config or load_config(args.model_name_or_path, args.trust_remote_code)
    model = without_weights(args.model_name_or_path, args.trust_remote_code, config, args.task.auto_class, **options)
    if args.add_tokens:
        from utils.model.tokenizer import load_run_tokenizer

        tokenizer = load_run_tokenizer(args)
        resize_embeddings(model, tokenizer.convert_tokens_to_ids(list(new_tokens(args))))
    if kind.quantised:
        _quantise(model, _how_quantised(args, train_args, dtype))
    return model


def _adapter(args, model, log: bool):
    """The configuration of the adapter that the run would start with, new or trained before; None without one."""
    row = adapter_of(args)
    if args.adapter_name_or_path and row.is_adapter:
        return saved_config(args.adapter_name_or_path)
    tokenizer = template = None
    trains_special = args.train_special_tokens == "on" and args.task.uses_template
    if row.trains_token_rows and (trains_special or args.add_tokens):
        from utils.model.tokenizer import load_run_tokenizer
        from utils.template import get_run_template

        tokenizer = load_run_tokenizer(args)
        template = get_run_template(args, tokenizer) if trains_special else None
    return build_adapter(args, model, tokenizer, template, log)


def _how_quantised(args, train_args, dtype):
    """The base's own BitsAndBytesConfig where it is saved in 4 bits, else that of `--train_mode qlora`."""
    from transformers import BitsAndBytesConfig

    saved = quantisation_of(args.model_name_or_path)
    if saved is None:
        return quantisation_options(dtype, train_args)["quantization_config"]
    options = BitsAndBytesConfig.from_dict(saved)
    options.bnb_4bit_compute_dtype = dtype
    return options


def _quantise(model, options) -> None:
    """Replaces the layers that bitsandbytes would, as transformers does when it loads."""
    import torch
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    dtype = options.bnb_4bit_compute_dtype
    with torch.device("meta"):
        kept = options.llm_int8_skip_modules or get_keys_to_not_convert(model)
        replace_with_bnb_linear(model, kept, options)
    model.requires_grad_(False)
    for parameter in model.parameters():
        if not is_quantised(parameter):
            parameter.data = parameter.data.to(dtype)  # biases of new layers are float32 until loaded
    model.is_loaded_in_4bit = True


@contextlib.contextmanager
def _shapes_of_quantised_weights():
    """DoRA asks for a weight's values when it begins; on the meta device a weight in 4 bits still has its shape."""
    with patch("peft.tuners.lora.dora.dequantize_module_weight", lambda layer: layer.weight.data):
        yield


def is_quantised(weight) -> bool:
    """Whether a weight of the meta model stands for one in 4 bits."""
    return type(weight).__name__ == "Params4bit"


# ------------------------------------------------------------------ counts
@dataclass(frozen=True)
class ModelSize:
    """How large a run's model is.

    Attributes:
        weights: how many there are, without an adapter's.
        trained: how many of them, or of the adapter's, are trained. The embeddings that `--train_special_tokens auto`
            may train as well are not among them: only the weights' values tell.
        config: transformers.PretrainedConfig
        position_table: whether positions are rows of a table, which ends.
    """

    weights: int
    trained: int
    config: Any
    position_table: bool


def model_size(args) -> ModelSize:
    """Counts the weights of a run's model by its config.json alone.

    Args:
        args: CommonArgs.

    Raises:
        UserError: the model cannot be built, or has no modules of the names given for its adapter.
        Exception: the model's own code, or PEFT, needs more than shapes.
    """
    key = repr(sorted(vars(args).items()))
    if key not in _SIZES:
        _SIZES[key] = _count(args)
    return _SIZES[key]


_SIZES: dict[str, ModelSize] = {}  # the doctor asks several times


def _count(args) -> ModelSize:
    import torch
    from peft import get_peft_model

    args = copy.copy(args)
    args.init_lora_weights = "default"  # others need the weights' values
    model = without_weights(args.model_name_or_path, args.trust_remote_code, auto_class=args.task.auto_class)
    weights = trained = model.num_parameters()
    table = any("wpe" in name or "embed_positions" in name for name, _ in model.named_parameters())
    config = model.config
    if adapter_of(args).is_adapter:
        adapter = saved_config(args.adapter_name_or_path) if args.adapter_name_or_path else new_config(args, model)
        with torch.device("meta"):
            model = get_peft_model(model, adapter)
        freeze_constants(model)
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return ModelSize(weights, trained, config, table)


def model_size_or_none(args) -> ModelSize | None:
    """`model_size`, or None where it cannot be had: what loads the weights says why."""
    try:
        return model_size(args)
    except Exception:  # each model's code raises its own
        return None
