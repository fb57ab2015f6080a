"""The model a run would train, on the meta device: every shape and type, and not one weight."""

import contextlib
import math
from dataclasses import dataclass
from unittest.mock import patch

from utils.model.adapter import ADAPTERS, build_adapter
from utils.model.load import CHECKPOINTING_FROM, without_weights
from utils.model.quantised import quantisation_of, quantised
from utils.model.tokenizer import load_failure
from utils.runtime.errors import UserError

BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale in NF4, and scales that share one (QLoRA, section 3)


def compute_dtype(args):
    """The type of the arithmetic.

    Args:
        args: CommonArgs, `precision` settled.
    """
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]


def load_config(args):
    """Reads config.json alone.

    Raises:
        UserError: there is none, or it is of no model known here.
    """
    from transformers import AutoConfig

    path = args.model_name_or_path
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # each model's code raises its own
        raise UserError(load_failure("config.json", "--model_name_or_path", path, error)) from error


def meta_model(args, train_args, laid_out: bool, config=None):
    """Builds what the trainer would have, adapters included, without memory for a single weight.

    Args:
        args: CommonArgs; of `train_special_tokens` only `on` counts, `auto` needs the weights.
        train_args: the recipe's TrainArgument.
        laid_out: whether DeepSpeed lays the weights out, which wants all of them in one type.
        config: from `load_config`, to read it once for several models.

    Returns:
        transformers.PreTrainedModel, or peft.PeftModel around it, on the meta device.

    Raises:
        UserError: the configuration, or `--lora_target_modules`, fits no model.
    """
    import torch
    from peft import get_peft_model

    dtype = compute_dtype(args)
    model = meta_base(args, train_args, config)
    adapter = _adapter(args, model)
    if adapter is not None:
        with torch.device("meta"), _shapes_of_quantised_weights():
            model = get_peft_model(model, adapter)
    for parameter in model.parameters():
        if laid_out and args.precision != "fp32" and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
        elif parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def meta_base(args, train_args, config=None):
    """The base alone, as `load_model` would have it: quantised where the run's is."""
    import torch

    kind, dtype = ADAPTERS[args.train_mode], compute_dtype(args)
    options = {} if args.attn_implementation in ("auto", "flash_attention_2") else {
        "attn_implementation": args.attn_implementation
    }  # fmt: skip
    options["dtype"] = dtype if kind.lora else torch.float32
    config = config or load_config(args)
    model = without_weights(args.model_name_or_path, args.trust_remote_code, config, **options)
    if kind.quantised:
        _quantise(model, _how_quantised(args, train_args, dtype))
    return model


def _adapter(args, model):
    """The adapter the run would begin with, or go on with."""
    from peft import PeftConfig

    if args.adapter_name_or_path and ADAPTERS[args.train_mode].lora:
        adapter = PeftConfig.from_pretrained(args.adapter_name_or_path)
        adapter.inference_mode = False
        return adapter
    tokenizer = template = None
    if args.train_special_tokens == "on" and args.task_type != "pretrain" and ADAPTERS[args.train_mode].lora:
        from utils.model.tokenizer import tokenizer_of
        from utils.template import get_template

        tokenizer = tokenizer_of(args)
        template = get_template(args.template_name, tokenizer, args.template_date)
    return build_adapter(args, model, tokenizer, template)


def _how_quantised(args, train_args, dtype):
    """The base's own BitsAndBytesConfig where it is saved in 4 bits, else that of `--train_mode qlora`."""
    from transformers import BitsAndBytesConfig

    saved = quantisation_of(args.model_name_or_path)
    if saved is None:
        return quantised(dtype, train_args)["quantization_config"]
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


@dataclass(frozen=True)
class Quantised:
    """What bitsandbytes makes of a linear layer's weight (NF4, double quantisation).

    Attributes:
        packed: bytes of the 4-bit numbers, two a byte.
        scales: bytes of the 8-bit scales of each 64 weights, the float32 scales of each 256 of those, and the offset.
        codes: bytes of the two tables that say what a number stands for, 16 and 256 float32.
    """

    packed: int
    scales: int
    codes: int

    @property
    def bytes(self) -> int:
        return self.packed + self.scales + self.codes


def quantised_bytes(weights: int) -> Quantised:
    """`quantised_bytes(256 * 704)` → 90,112 packed, 2,816 + 44 + 4 of scales, 64 + 1,024 of codes."""
    blocks = math.ceil(weights / BLOCK)
    return Quantised((weights + 1) // 2, blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4, 4 * (16 + 256))


def uses_checkpointing(train_args, weights: int) -> bool:
    """Whether a run recomputes activations: as asked, else by the model's size."""
    asked = train_args.gradient_checkpointing
    return weights >= CHECKPOINTING_FROM if asked is None else asked
