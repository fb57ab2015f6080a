"""The model of a run without its weights, on the meta device: its shapes, its types and what is trained."""

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from utils.model.adapter import ADAPTERS, build_adapter
from utils.model.adapter_targets import find_targets
from utils.model.options import compute_dtype, quantisation_options
from utils.model.parts import linear_layers, size_of
from utils.model.quantised import quantisation_of
from utils.runtime.errors import UserError, load_failure
from utils.storage.weights import read_header


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
    from transformers import AutoConfig

    try:
        config = config or AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return getattr(transformers, auto_class).from_config(config, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # the hub, and each model's code, raise their own
        raise UserError(load_failure("model", "--model_name_or_path", path, error)) from error


@contextlib.contextmanager
def whole_models(train_args):
    """Keeps a model that is only looked at whole: ZeRO-3 would split it, with a part for every process."""
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
    model = without_weights(args.model_name_or_path, args.trust_remote_code, config, args.task.auto_class, **options)
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
    if args.train_special_tokens == "on" and args.task.uses_template and ADAPTERS[args.train_mode].lora:
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


@dataclass(frozen=True)
class Shape:
    """A model's size, without its weights.

    Attributes:
        weights: how many there are.
        linear: name → (inputs, outputs) of each linear layer.
        modules: the names of those that an adapter goes on.
        position_table: whether positions are rows of a table, which ends.
    """

    weights: int
    linear: dict[str, tuple[int, int]]
    modules: frozenset[str]
    position_table: bool


@functools.cache
def model_shape(path: str, trust_remote_code: bool, modules: str | None) -> Shape | None:
    """A model's size by its config.json alone; None where that cannot be had.

    Args:
        path: a folder or a hub's name.
        trust_remote_code: whether Python code beside the model may run.
        modules: `--lora_target_modules`.
    """
    try:
        model = without_weights(path, trust_remote_code)
        chosen = find_targets(model, modules).layers
    except Exception:  # each model's code raises its own; what loads the weights says it better
        return None
    linear = {name: size_of(layer) for name, layer in linear_layers(model).items()}
    table = any("wpe" in name or "embed_positions" in name for name, _ in model.named_parameters())
    return Shape(sum(weight.numel() for weight in model.parameters()), linear, chosen, table)


def shape_of(args) -> Shape | None:
    """`model_shape` of a run."""
    return model_shape(args.model_name_or_path, args.trust_remote_code, args.lora_target_modules)


def trained_weights(args, shape: Shape) -> int:
    """How many weights are trained.

    LoRA adds r (in + out) to a layer (arXiv 2106.09685, section 4.1), DoRA a magnitude for each output (arXiv
    2402.09353, section 4).
    """
    if not ADAPTERS[args.train_mode].lora:
        return shape.weights
    if args.adapter_name_or_path:
        try:
            header, _ = read_header(Path(args.adapter_name_or_path) / "adapter_model.safetensors")
            return sum(math.prod(entry["shape"]) for entry in header.values())
        except (ValueError, OSError):
            return 0
    adapted = [size for name, size in shape.linear.items() if name in shape.modules]
    return sum(args.lora_rank * (n_in + n_out) + (n_out if args.use_dora else 0) for n_in, n_out in adapted)


def weights(args, train_args) -> dict | None:
    """How many weights there are and how many are trained, of a model without values; None where they can't be told.

    The embeddings that `--train_special_tokens auto` may train as well are not counted: only the values tell.

    Returns:
        `{"all": 3939840, "trained": 270336, "config": …}`, with the model's configuration.

    Raises:
        UserError: the model cannot be built, or has no modules of the names given for its adapter.
    """
    import torch
    from peft import PeftConfig, get_peft_model

    with whole_models(train_args):
        try:
            path, code = args.model_name_or_path, args.trust_remote_code
            model = without_weights(path, code, auto_class=args.task.auto_class)
        except UserError:
            if args.trust_remote_code:  # its code may want more than shapes
                return None
            raise
        found = {"all": model.num_parameters(), "trained": model.num_parameters(), "config": model.config}
        if not ADAPTERS[args.train_mode].lora:
            return found
        try:
            if args.adapter_name_or_path:
                adapter = PeftConfig.from_pretrained(args.adapter_name_or_path)
                adapter.inference_mode = False
            else:
                plain = replace(args, train_special_tokens="off", init_lora_weights="default")
                adapter = build_adapter(plain, model, None, None)
            with torch.device("meta"):
                model = get_peft_model(model, adapter)
        except UserError:
            raise
        except Exception:  # each model's own code raises its own
            return None
    return found | {"trained": sum(weight.numel() for weight in model.parameters() if weight.requires_grad)}
