"""An adapter's files put onto a base: its kind, its vocabulary, and whether every tensor found its place."""

import json
from pathlib import Path

from loguru import logger

from utils.model.pissa import plain_lora
from utils.patches.lazy_imports import import_peft
from utils.runtime.errors import UserError, load_failure
from utils.storage.weights import read_header

_PREFIX = "base_model.model."  # PEFT's, before each tensor's name
# settings of adapter_config.json under which the adapter is more than a change of single weights → what it is
_NOT_MERGEABLE = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which changes nothing before its invocation tokens",
    "layer_replication": "made on repeated layers (layer_replication), which the base does not have",
    "arrow_config": "a router over several adapters (Arrow)",
}


def check_mergeable(path: str) -> list[str]:
    """The problems of merging an adapter, as far as its adapter_config.json shows them."""
    file = Path(path) / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # named where the adapter is looked for
    kind = str(config.get("peft_type"))
    if not _has_merge(kind):
        return [f"adapter {path!r} is of the type {kind}, which changes no weights of the base and cannot be merged"]
    return [
        f"adapter {path!r} is {what}, and cannot be merged; use it with PEFT, as infer does"
        for key, what in _NOT_MERGEABLE.items()
        if config.get(key)
    ]


def trained_tokens(path: str) -> list[int]:
    """The ids whose rows an adapter trained by themselves."""
    file = Path(path) / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    given = config.get("trainable_token_indices") or config.get("token_indices") or []
    return sorted({token for ids in given.values() for token in ids} if isinstance(given, dict) else given)


def _has_merge(kind: str) -> bool:
    import_peft()
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuners = {key.value: tuner for key, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    return hasattr(tuners.get(kind), "merge_and_unload")


def attach_adapter(model, path: str, flag: str, trainable: bool = False):
    """Puts an adapter onto a model, whose vocabulary follows the adapter's where that was resized.

    Args:
        model: the base.
        path: the adapter's folder, or a hub's name.
        flag: the flag it came by, for the messages.
        trainable: whether it is trained further.

    Returns:
        peft.PeftModel

    Raises:
        UserError: it cannot be loaded, is of another shape, or has tensors for which the model has no place.
    """
    import_peft()
    from peft import PeftModel

    fit_vocabulary(model, path, flag)
    try:
        with plain_lora(path, flag) as place:
            peft = PeftModel.from_pretrained(model, place, is_trainable=trainable)
            if peft.active_peft_config.is_prompt_learning:
                return peft
            if trainable:
                _widen_saved_modules(peft)
            found = peft.load_adapter(place, "default", is_trainable=trainable)  # once more, for what it reports
    except UserError:
        raise
    except Exception as error:  # another shape, a damaged file, the hub
        raise UserError(load_failure("adapter", flag, path, error)) from error
    # PEFT only warns: an adapter made for other module names would change nothing, or a part. Under a resized
    # vocabulary it saves each module a second time, with its wrapper's name
    unexpected = [name for name in found.unexpected_keys if ".modules_to_save." not in name]
    for names, what in ((unexpected, "has tensors for"), (found.missing_keys, "lacks tensors of")):
        if names:
            raise UserError(
                f"the adapter of {flag} {path!r} {what} {len(names)} places that do not belong together with the base, "
                f"such as {sorted(names)[0]!r}; give the base it was trained on"
            )
    return peft


def _widen_saved_modules(peft) -> None:
    """Casts PEFT's copies of modules to float32, as PEFT does with adapters, so that loading rounds no weight."""
    from peft.utils.other import ModulesToSaveWrapper

    for module in peft.modules():
        for weight in module.modules_to_save.parameters() if isinstance(module, ModulesToSaveWrapper) else ():
            if weight.is_floating_point() and not hasattr(weight, "ds_numel"):  # which ZeRO-3 splits
                weight.data = weight.data.float()


def fit_vocabulary(model, path: str, flag: str) -> None:
    """Resizes a model's embeddings to the number of rows an adapter was trained with.

    Raises:
        UserError: the adapter does not hold the rows that the base lacks.
    """
    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        return
    try:
        header = read_header(file)[0]
    except (ValueError, OSError) as error:
        raise UserError(f"the adapter of {flag} {path!r}: {error}; copy or download it again") from error
    layers = {name: layer for name, layer in _vocabulary_layers(model).items() if layer is not None}
    rows = {name: _rows(header, name) for name in layers}
    wanted = {count for counts in rows.values() for count in counts.values()}
    # ZeRO-3 leaves each process a part, and the whole's shape beside it
    has = {getattr(layer.weight, "ds_shape", layer.weight.shape)[0] for layer in layers.values()}
    added = [token for token in trained_tokens(path) if token >= min(has)]
    if not wanted and added == list(range(min(has), min(has) + len(added))):
        wanted, rows = ({max(added) + 1} if added else set()), {name: {"weight": 0} for name in layers}
    if not wanted or wanted == has:
        return
    held = [name for name, counts in rows.items() if "weight" in counts]
    if len(wanted) > 1 or (max(wanted) > min(has) and len(held) < len(layers)):
        raise UserError(
            f"the adapter of {flag} {path!r} was trained on a vocabulary of {max(wanted):,} rows, and the base has "
            f"{min(has):,}; the adapter does not hold the new rows of both embedding and head. Save the resized base "
            "with save_pretrained, and give that as the base"
        )
    logger.info("the embeddings are resized from {:,} rows to {:,}, as in {}", min(has), max(wanted), path)
    model.resize_token_embeddings(max(wanted), mean_resizing=False)


def _vocabulary_layers(model) -> dict:
    """Name → layer, of the embedding and the head."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in wanted)}


def _rows(header: dict, layer: str) -> dict[str, int]:
    """How many rows of the vocabulary an adapter's tensors for a layer have, `weight` for the whole matrix."""
    found = {}
    start = _PREFIX + layer + "."
    for name, entry in header.items():
        if not name.startswith(start):
            continue
        shape, rest = entry["shape"], name.removeprefix(start)
        if rest in ("weight", "base_layer.weight"):
            found["weight"] = shape[0]
        elif rest.startswith("lora_embedding_A"):
            found["A"] = shape[1]
        elif rest.startswith("lora_B"):
            found["B"] = shape[0]
    return found
