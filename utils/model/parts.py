"""The parts of a model, found by how it is built: linear layers, what text does not go through, routers of experts."""

import math
import re

from loguru import logger

# what a router is called among the children of a module that holds experts; its output chooses among them, and a
# low-rank change there sends tokens elsewhere and unsettles training
_ROUTER = re.compile(r"(^|_)(gate|router|gating|wg)$")
EXPERT = re.compile(r"experts?($|[A-Z_])|Experts?$")
_PROBE_TOKENS = 32
MUCH = 0.1  # weights without an adapter are named from this share of the model's


def linear_layers(model) -> dict:
    """Name → module of every linear layer but the head: torch's, those in 4 or 8 bits, and GPT-2's Conv1D."""
    import torch

    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or is_conv1d(module)) and module is not head
    }


def size_of(layer) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    return layer.weight.shape if is_conv1d(layer) else (layer.in_features, layer.out_features)


def is_conv1d(module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_plain(module) -> bool:
    """Whether a layer computes W x + b, to which LoRA adds B A x; subclasses of Linear may not."""
    import torch

    weight = module.weight
    if type(module) is torch.nn.modules.linear.NonDynamicallyQuantizableLinear:
        return False  # of torch's MultiheadAttention, which reads its weight without calling it
    quantised = type(weight) is not torch.nn.Parameter or weight.element_size() == 1
    if type(module).forward is torch.nn.Linear.forward or is_conv1d(module) or quantised or hasattr(weight, "ds_numel"):
        return True
    x = torch.linspace(-1, 1, 2 * module.in_features, dtype=weight.dtype, device=weight.device)
    x = x.view(1, 2, module.in_features)
    try:
        with torch.no_grad():
            got, wanted = module(x), torch.nn.functional.linear(x, weight, module.bias)
        return got.shape == wanted.shape and (weight.is_meta or torch.allclose(got, wanted, rtol=1e-2, atol=1e-2))
    except Exception:  # it wants an input of another shape, or gives several outputs
        return False


# ------------------------------------------------------------------ what is not for text
def towers_of(model) -> list[str]:
    """The names of a multimodal model's parts that text does not go through: towers for images and sound, projectors.

    `["model.multi_modal_projector", "model.vision_tower"]` for Gemma-3.
    """
    from transformers import PreTrainedModel

    modules = dict(model.named_modules())
    text = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    on_the_way = {name for name, module in modules.items() if any(part in text for part in module.modules())}
    found = set()
    for name, module in modules.items():
        if name and isinstance(module, PreTrainedModel) and "text" not in _modalities(module):
            parts = name.split(".")
            lifted = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
            found.add(next((above for above in lifted if above not in on_the_way), name))
    decoder = model.get_decoder() if model.config.get_text_config() is not model.config else None
    place = next((name for name, module in modules.items() if module is decoder), "")
    while "." in place:  # what stands beside the text model, within the model that holds both
        place = place.rpartition(".")[0]
        found |= {f"{place}.{child}" for child, _ in modules[place].named_children()} - on_the_way
    return sorted(name for name in found if not any(name.startswith(f"{other}.") for other in found))


def _modalities(module) -> set[str]:
    given = module.input_modalities
    return {given} if isinstance(given, str) else set(given)


def freeze_towers(model, log: bool = True) -> None:
    """Freezes the parts that text does not go through, and logs their names.

    Optimizer and gradient synchronisation between processes would otherwise wait for gradients that never come.

    Args:
        model: transformers' model.
        log: whether to log the names.
    """
    moving = []
    for name in towers_of(model):
        tower = model.get_submodule(name)
        moving += [name] if any(weight.requires_grad for weight in tower.parameters()) else []
        tower.requires_grad_(False)
    if moving and log:
        logger.info("only text is trained: {} stay as they are", ", ".join(moving))


# ------------------------------------------------------------------ routers
def routers_of(model) -> set[str]:
    """The names of the linear layers that choose experts, in a mixture of experts.

    They are children of a module that holds experts, and are named as routers are or have one output for each expert;
    every linear layer within such a child is part of the router.
    """
    import torch

    counts = _expert_counts(model.config)
    found = set()
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if not any(EXPERT.search(child) or EXPERT.search(type(part).__name__) for child, part in children.items()):
            continue
        for child, part in children.items():
            one_each = isinstance(part, torch.nn.Linear) and part.out_features in counts
            if _ROUTER.search(child) or one_each:
                found |= {".".join(filter(None, (name, child, inner))) for inner, _ in part.named_modules()}
    return found


def _expert_counts(config) -> set[int]:
    values = config.get_text_config().to_dict().items()
    counts = {value for key, value in values if re.search(r"(num|n|routed).*experts$", key) and isinstance(value, int)}
    return {count for count in counts if count > 1}


# ------------------------------------------------------------------ what a text reaches
def unreached(model, names: list[str]) -> dict[str, str]:
    """Layers whose output has no part in the logits of a text: cross-attention without an encoder, a pooler.

    Returns:
        layer → why; empty where the model cannot be run, since its weights are not here or not whole.
    """
    import torch

    if any(weight.is_meta or hasattr(weight, "ds_numel") for weight in model.parameters()):
        return {}
    marks = {name: torch.zeros((), device=model.device, requires_grad=True) for name in names}
    modules = dict(model.named_modules())
    hooks = [
        # added to what a layer gives, a zero that the logits' gradient reaches if it reaches the layer
        modules[name].register_forward_hook(lambda module, inputs, output, mark=mark: output + mark.to(output))
        for name, mark in marks.items()
    ]
    was_training = model.training
    model.requires_grad_(False)  # PEFT would do so next; the graph then holds no weight's gradient
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(16, 16 + _PROBE_TOKENS, device=model.device)[None] % vocabulary
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            logits = model.train()(input_ids=ids, use_cache=False).logits
            gradients = torch.autograd.grad(logits.float().sum(), list(marks.values()), allow_unused=True)
    except Exception as error:  # each model's code raises its own; the probe before training judges it
        logger.debug("which layers a text goes through is not known: {}: {}", type(error).__name__, error)
        return {}
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    reached = {_alike(name) for name, gradient in zip(marks, gradients, strict=True) if gradient is not None}
    return {name: "no text goes through it" for name in names if _alike(name) not in reached}


def _alike(name: str) -> str:
    """A layer's name without the number of its expert: a short text does not come to every one."""
    parts = name.split(".")
    return ".".join(
        "N" if part.isdigit() and place and EXPERT.search(parts[place - 1]) else part
        for place, part in enumerate(parts)
    )


def frozen_tensors(model) -> list[tuple[str, float]]:
    """Modules that hold much of the weights and are neither linear layers nor embeddings: experts as one tensor."""
    import torch

    total = sum(map(count_weights, model.parameters()))
    plain = (torch.nn.Linear, torch.nn.Embedding)
    towers = tuple(f"{name}." for name in towers_of(model))
    shares: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, plain) or is_conv1d(module) or f"{name}.".startswith(towers):
            continue
        own = sum(map(count_weights, module.parameters(recurse=False)))
        shares[numberless(name)] = shares.get(numberless(name), 0) + own / total
    return [(name, share) for name, share in shares.items() if share >= MUCH]


def count_weights(weight) -> int:
    """Counts the weights in a parameter: all of one that ZeRO-3 splits; of one in 4 bits the weights, not the bytes."""
    packed_from = getattr(getattr(weight, "quant_state", None), "shape", None)  # bitsandbytes' Params4bit
    return math.prod(packed_from) if packed_from else getattr(weight, "ds_numel", weight.numel())


def numberless(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "N", name)
