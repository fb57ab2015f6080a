"""Merges an adapter into its base layer by layer in float32, and unties head and embedding where it has to."""

import warnings
from typing import Any, NamedTuple

from loguru import logger

from utils.model.adapter_files import attach_adapter, fit_vocabulary, trained_tokens
from utils.model.merge_check import MOST, compare, logits_in_float32, logits_or_none, probe_ids, refuse_difference
from utils.runtime.errors import UserError


class Merged(NamedTuple):
    """A merged model and the logits it is checked with.

    Attributes:
        model: transformers.PreTrainedModel
        ids: the probe's token ids, [rows, tokens].
        base: the logits without the last adapter; None if the model cannot compute on the CPU.
        adapter: the logits with the last adapter, unmerged; None likewise.
        merged: the logits of `model`; None likewise.
    """

    model: Any
    ids: Any
    base: Any
    adapter: Any
    merged: Any = None


class Rounding:
    """Measures how much of the trained change is lost when merged weights are rounded to a smaller dtype."""

    def __init__(self):
        self.moved = self.lost = 0.0

    def add(self, before, merged, rounded) -> None:
        """Adds one layer's weights: before the merge, merged in float32, and rounded."""
        for old, new, kept in zip(before, merged, rounded, strict=True):
            self.moved += float((new - old).double().square().sum())
            self.lost += float((new - kept.detach().float()).double().square().sum())

    def share(self) -> float:
        """‖rounding error‖ / ‖change‖, Frobenius norms over all weights added."""
        return (self.lost / self.moved) ** 0.5 if self.moved else 0.0

    def report(self, dtype: str) -> None:
        """Logs the share that was lost, if any."""
        if self.lost:
            log = logger.warning if self.share() >= MOST else logger.info
            log(
                "rounding to {} moved the merged weights by {:.2g} % of what training moved them; "
                "--dtype float32 keeps it all, in twice the space",
                dtype,
                100 * self.share(),
            )


def merge_onto(model, adapter: str, flag: str, types: dict | None, rounding: Rounding | None = None) -> Merged:
    """Puts an adapter onto a model, merges it, and compares the logits before and after merging.

    Args:
        model: the base, on the CPU.
        adapter: the adapter's folder.
        flag: the flag that named it, for the messages.
        types, rounding: as for `merge_adapter`.

    Raises:
        UserError: the adapter does not fit, cannot be merged, or the merged model gives other logits.
    """
    import torch

    fit_vocabulary(model, adapter, flag)
    if any(weight.is_meta for weight in model.parameters()):  # with FSDP only the first process loads the weights
        return Merged(merge_adapter(attach_adapter(model, adapter, flag), adapter, types, rounding), None, None, None)
    ids = probe_ids(model, trained_tokens(adapter))
    base = logits_or_none(model, ids)
    peft = attach_adapter(model, adapter, flag)
    expected = logits_or_none(peft, ids) if base is not None else None
    exact = expected is not None and _fits_in_float32(peft)
    model = merge_adapter(peft, adapter, types, rounding, wide=exact)
    if exact:
        # compared before rounding, so that a wrong merge cannot be mistaken for rounding
        compared = compare(base, expected, logits_in_float32(model, ids))
        refuse_difference(compared, "float32", "the merged model", adapter)
        _round(model, types)
    smallest = min((types or {"": torch.float32}).values(), key=lambda kind: torch.finfo(kind).bits)
    if smallest is torch.float16 and not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError("--dtype float16 has no room for the largest of the merged weights; use bfloat16 or float32")
    found = None
    if expected is not None:
        found = logits_in_float32(model, ids)
        refuse_difference(compare(base, expected, found), smallest, "the merged model", adapter, exact)
    return Merged(model, ids, base, expected, found)


def _fits_in_float32(peft) -> bool:
    """Whether all layers that the adapter changes fit into free memory at once in float32."""
    import psutil
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module.get_base_layer() for module in peft.modules() if isinstance(module, BaseTunerLayer)]
    low = {id(weight): weight for layer in layers for weight in layer.parameters() if weight.element_size() < 4}
    needed, free = sum(4 * weight.numel() for weight in low.values()), psutil.virtual_memory().available
    if needed < 0.9 * free:
        return True
    logger.warning(
        "the merge is not compared before it is rounded: that needs {:.1f} GB, and {:.1f} GB of memory are free. A "
        "difference that is as large as what the adapter changes is refused, even where rounding alone explains it",
        needed / 1e9,
        free / 1e9,
    )
    return False


def merge_adapter(peft, path: str, types: dict | None, rounding: Rounding | None = None, wide: bool = False):
    """Merges the adapter of a PEFT model and removes PEFT's layers.

    Args:
        peft: from `attach_adapter`.
        path: the adapter's, for the messages.
        types: name of a weight → its final torch.dtype; None keeps what the adapter changed in float32.
        rounding: counts what rounding to `types` costs.
        wide: keep what the adapter changed in float32 for now; the caller rounds it later with `_round`.

    Returns:
        transformers.PreTrainedModel; its config has `tie_word_embeddings: false` if embedding and head now differ.

    Raises:
        UserError: this kind of adapter cannot be merged, or the weights are not finite.
    """
    _refuse_shared_layers(peft, path)
    tied = separate_head(peft)
    by_weight = _types_by_weight(peft, types)
    try:
        model = _merge_and_unload(peft, by_weight, rounding, wide)
    except ValueError as error:  # PEFT's, for weights that are not finite
        raise UserError(
            f"adapter {path!r} cannot be merged: {error}. Its training may have diverged; see its train.log, and take "
            "a checkpoint from before"
        ) from error
    except Exception as error:  # each kind of adapter raises its own
        kind = peft.peft_config["default"].peft_type.value
        raise UserError(
            f"adapter {path!r} is of the type {kind} and cannot be merged: {type(error).__name__}: {error}"
        ) from error
    if not wide:
        _round(model, types)
    if tied:
        _retie_head(model)
    return model


def _refuse_shared_layers(peft, path: str) -> None:
    """Refuses linear layers that share one weight, as the blocks of Zamba do, where each has its own adapter."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    head, names = peft.get_base_model().get_output_embeddings(), {}  # separate_head unties the head
    for name, module in peft.get_base_model().named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        if isinstance(base, torch.nn.Linear) and module is not head:
            first = names.setdefault(id(base.weight), name)
            if first != name:
                raise UserError(
                    f"adapter {path!r} cannot be merged: {first} and {name} share one weight of the base, and each has "
                    "an adapter of its own, which one weight cannot hold; use it with PEFT, as infer does"
                )


def _merge_and_unload(peft, types: dict, rounding: Rounding | None, wide: bool):
    """Merges layer by layer, so that only one layer at a time takes the memory of float32; then unwraps the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [module for module in peft.modules() if isinstance(module, BaseTunerLayer)]:
        _merge_layer(layer, types, rounding, wide)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that each layer is merged already
        model = peft.merge_and_unload(safe_merge=True)
    if left := [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")]:
        raise NotImplementedError(f"PEFT leaves its layer on {left[0]}, which it wraps twice")
    return model


def _round(model, types: dict | None) -> None:
    for name, weight in model.named_parameters() if types is not None else ():
        weight.data = weight.data.to(types.get(name, weight.dtype))


def _merge_layer(layer, types: dict, rounding: Rounding | None, wide: bool) -> None:
    base = layer.get_base_layer().float()
    before = [weight.detach().clone() for weight in base.parameters()] if rounding else []
    layer.merge(safe_merge=True)
    merged = [weight.detach() for weight in base.parameters()]
    rounded = [weight.detach().to(types.get(id(weight), weight.dtype)) for weight in base.parameters()]
    if rounding:
        rounding.add(before, merged, rounded)
    for weight, low in zip(base.parameters(), () if wide else rounded, strict=not wide):
        weight.data = low


def types_of(model) -> dict:
    """Name of a weight → its torch.dtype; of tied weights each name."""
    return {name: weight.dtype for name, weight in model.named_parameters(remove_duplicate=False)}


def _types_by_weight(peft, types: dict | None) -> dict:
    """id of a weight → its final torch.dtype, found by its name without the parts that PEFT's wrappers add."""
    wrappers = {"base_layer", "token_adapter", "original_module"}
    found = {}
    for name, weight in peft.get_base_model().named_parameters(remove_duplicate=False) if types is not None else ():
        plain = ".".join(part for part in name.split(".") if part not in wrappers)
        found[id(weight)] = types.get(plain, weight.dtype)
    return found


def separate_head(peft) -> bool:
    """Unties head and embedding if an adapter changes only one of them.

    PEFT 0.21 adapts each separately, so merging into a shared matrix would change the other as well. Trained token rows
    change both in the same way, so these stay tied.

    Returns:
        whether they were untied.
    """
    import torch
    from peft.utils.other import TrainableTokensWrapper

    model = peft.get_base_model()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head is embedding:
        return False
    shared = {id(weight) for weight in embedding.parameters()} & {id(weight) for weight in head.parameters()}
    wrapped = [type(layer).__module__.startswith("peft.") for layer in (embedding, head)]
    if not shared or not any(wrapped):
        return False
    if all(isinstance(layer, TrainableTokensWrapper) for layer in (embedding, head)):
        return False
    for module in head.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in shared and name == "weight":
                setattr(module, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
    return True


def _retie_head(model) -> None:
    """Ties head and embedding again if they are still equal; else config.json says that they are not."""
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    equal = torch.equal(embedding.weight, head.weight)
    if equal:
        head.weight = embedding.weight
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = equal
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    if equal:
        return
    logger.info(
        "the adapter changes the embedding or the head, which were tied in the base: they are two matrices now, and "
        "config.json has tie_word_embeddings false"
    )
