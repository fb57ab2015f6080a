"""`--rope_scaling`: a longer context through scaled rotary embeddings (RoPE), set in the config before weights load."""

import copy
import json
import math
import re
from pathlib import Path

from loguru import logger

from utils.model.base_config import load_config
from utils.runtime.errors import UserError, nearest
from utils.storage.run_folder import read_manifest, read_run_note

# rope type → (keys it needs, keys it may have) beside rope_type and factor, as transformers validates them
_ORIGINAL = "original_max_position_embeddings"
_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "dynamic": ((), ()),
    "yarn": (
        (),
        (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("low_freq_factor", "high_freq_factor"), (_ORIGINAL,)),
    "longrope": (("short_factor", "long_factor"), (_ORIGINAL, "attention_factor")),
}
_SCALING_KEYS = {key for needed, optional in _TYPES.values() for key in (*needed, *optional)} | {"rope_type", "type"}
_SCALING_KEYS.add("factor")
_EXAMPLE = """'{"rope_type": "yarn", "factor": 4}', or yarn:4"""


def parse_rope_scaling(text: str) -> dict:
    """Reads the value of `--rope_scaling`.

    `'{"rope_type": "yarn", "factor": 4}'` and `yarn:4` → `{"rope_type": "yarn", "factor": 4.0}`

    Raises:
        UserError: it is not a scaling that transformers has.
    """
    flag = f"--rope_scaling {text!r}"
    if short := re.fullmatch(r"\s*(\w+)\s*:\s*(\d+\.?\d*)\s*", text):
        text = json.dumps({"rope_type": short[1], "factor": float(short[2])})
    try:
        given = json.loads(text)
    except ValueError as error:
        raise UserError(f"{flag} is not JSON ({error}); give {_EXAMPLE}") from error
    if not isinstance(given, dict):
        raise UserError(f"{flag} is not a JSON object; give {_EXAMPLE}")
    if "type" in given:  # the name in older files
        given = {"rope_type": given.pop("type")} | given
    if problem := _wrong_type(given) or _wrong_values(given):
        raise UserError(f"{flag} {problem}")
    return given | {"factor": float(given["factor"])}


def _wrong_type(given: dict) -> str | None:
    kind = given.get("rope_type")
    if kind not in _TYPES:
        what = "has no rope_type" if kind is None else f"has an unknown rope_type {kind!r}.{nearest(str(kind), _TYPES)}"
        return f"{what}; give one of {', '.join(_TYPES)}, as in {_EXAMPLE}"
    needed, optional = _TYPES[kind]
    lacking = [key for key in ("factor", *needed) if key not in given]
    if lacking:
        return f"lacks {', '.join(lacking)}, which {kind} needs; add it"
    unknown = sorted(given.keys() - {"rope_type", "factor", *needed, *optional})
    if unknown:
        allowed = ", ".join(("factor", *needed, *optional))
        return f"has {', '.join(unknown)}, which {kind} does not read; allowed: {allowed}"
    return None


def _wrong_values(given: dict) -> str | None:
    for key, value in given.items():
        if key in ("short_factor", "long_factor"):
            if not isinstance(value, list) or not value or not all(_is_positive(each) for each in value):
                return f"has {key} {value!r}; give a list of numbers above 0, one for each pair of dimensions"
        elif key == "truncate":
            if not isinstance(value, bool):
                return f"has truncate {value!r}; give true or false"
        elif key != "rope_type" and not _is_positive(value):
            return f"has {key} {value!r}; give a number above 0"
    if given["factor"] <= 1:
        return f"has factor {given['factor']:g}, which extends nothing; give a number above 1"
    if given["rope_type"] == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        return "has no high_freq_factor above its low_freq_factor; give a higher one, as 4 and 1 in Llama 3.1"
    return None


def _is_positive(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


# ------------------------------------------------------------------ a model's config
def load_scaled_config(
    path: str, rope_scaling: str | None, trust_remote_code: bool = False, flag="--model_name_or_path"
):
    """As `load_config`, with `--rope_scaling` applied.

    Raises:
        UserError: the config cannot be read, or the model has no such scaling.
    """
    config = load_config(path, trust_remote_code, flag)
    return scaled(config, parse_rope_scaling(rope_scaling), flag, path) if rope_scaling else config


def scaling_options(path: str, rope_scaling: str | None, trust_remote_code: bool, flag="--model_name_or_path") -> dict:
    """The argument `config` of `from_pretrained` with `--rope_scaling`, checked on the model; empty without the flag.

    Rotary embeddings compute their frequencies when they are built, so a config changed afterwards has no effect.

    Raises:
        UserError: the model has no such scaling.
    """
    if not rope_scaling:
        return {}
    check_scaling(path, rope_scaling, trust_remote_code, flag)
    config = load_scaled_config(path, rope_scaling, trust_remote_code, flag)
    logger.info("--rope_scaling {}: the context is {:,} positions", rope_scaling, positions_of(config))
    return {"config": config}


def scaled(config, scaling: dict, flag: str, path: str):
    """A copy of a config whose RoPE is scaled.

    Of a model whose layers have several kinds of RoPE, such as Gemma-3, the full-attention layers are scaled: the
    others see only a window. `max_position_embeddings` becomes the extended context, except where transformers and
    vLLM multiply it by the factor themselves (linear, dynamic).

    Args:
        config: transformers.PretrainedConfig
        scaling: from `parse_rope_scaling`.
        flag, path: the model, for messages.

    Raises:
        UserError: the config has no RoPE, or not what the scaling needs.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    model = f"--rope_scaling: {flag} {path!r} ({text.model_type})"
    ropes, trained = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    if not isinstance(ropes, dict) or not ropes:
        raise UserError(f"{model} has no rotary embeddings that transformers can scale; leave the flag out")
    by_layer = all(isinstance(value, dict) or value is None for value in ropes.values())
    old = ropes.get("full_attention") if by_layer else ropes
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    if not isinstance(old, dict) or (by_layer and "full_attention" not in kinds):
        raise UserError(f"{model} has no full_attention layer with rotary embeddings; leave the flag out")
    if by_layer and scaling["rope_type"] == "dynamic":
        raise UserError(f"{model} has a kind of rotary embeddings for each kind of layer, without dynamic; use yarn")
    original = scaling.get(_ORIGINAL) or old.get(_ORIGINAL) or trained
    if not isinstance(original, int):
        raise UserError(
            f"{model} has no max_position_embeddings; use yarn with {_ORIGINAL}, the context it was trained on"
        )
    # what the new scaling does not read of an old one goes: only rope_theta, sections and the like stay
    same = old.get("rope_type") == scaling["rope_type"]
    new = {key: value for key, value in old.items() if same or key not in _SCALING_KEYS} | scaling
    if scaling["rope_type"] in ("yarn", "llama3", "longrope"):
        new[_ORIGINAL] = original
        if getattr(text, _ORIGINAL, None):  # Phi-3 has it here, and transformers reads this one first
            setattr(text, _ORIGINAL, original)
        extended = int(original * scaling["factor"])
        text.max_position_embeddings = extended if scaling["rope_type"] == "yarn" else max(extended, trained or 0)
    elif by_layer and scaling["rope_type"] == "linear":
        text.max_position_embeddings = int(trained * scaling["factor"] / (old.get("factor") or 1))
    text.rope_parameters = {**ropes, "full_attention": new} if by_layer else new
    text.standardize_rope_params()
    for name in ("short_factor", "long_factor"):
        if name in new and len(new[name]) != (wanted := _rotary_pairs(text, new)):
            raise UserError(f"{model} rotates {wanted} pairs of dimensions, and {name} has {len(new[name])} numbers")
    return config


def _rotary_pairs(config, rope: dict) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size * rope.get("partial_rotary_factor", 1.0)) // 2


def positions_of(config) -> int | None:
    """The model's context in tokens, with RoPE scaling; None if it has no limit."""
    config = config.get_text_config()
    there = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(there, int) and isinstance(rope.get("factor"), int | float):
        there = max(there, int(rope["factor"] * rope.get(_ORIGINAL, there)))
    return there if isinstance(there, int) else None


# ------------------------------------------------------------------ the model at hand
def check_scaling(path: str, rope_scaling: str, trust_remote_code: bool, flag: str = "--model_name_or_path") -> None:
    """Checks on the model's own code, without weights, that the scaling changes its rotary embeddings.

    Raises:
        UserError: it has none that the scaling reaches, or none that can be checked.
    """
    import torch

    from utils.model.meta import without_weights

    before = load_config(path, trust_remote_code, flag).get_text_config()
    config = load_scaled_config(path, rope_scaling, trust_remote_code, flag)
    after = config.get_text_config()
    positions = torch.tensor([[0, 1, 7, 64, max(positions_of(after) - 1, 65)]])
    model = without_weights(path, trust_remote_code, config)
    rotary = {type(module) for module in model.modules() if hasattr(module, "rope_type") and _reads(module, after)}
    try:
        reached = bool(rotary) and all(
            _differ(kind(config=before), kind(config=after), after, positions) for kind in rotary
        )
    except Exception as error:  # each model's code has its own
        raise UserError(
            f"--rope_scaling cannot be checked on {flag} {path!r}: its rotary embeddings fail alone "
            f"({type(error).__name__}: {error}); leave the flag out"
        ) from error
    if not reached:
        raise UserError(
            f"--rope_scaling: the rotary embeddings of {flag} {path!r} ({after.model_type}) do not read it; leave the "
            "flag out"
        )


def _reads(module, config) -> bool:
    return getattr(getattr(module, "config", None), "rope_parameters", None) == config.rope_parameters


def _differ(before, after, config, positions) -> bool:
    """Whether two rotary embeddings rotate positions differently, in the layers that are scaled."""
    import torch

    by_layer = "full_attention" in config.rope_parameters
    options = {"layer_type": "full_attention"} if by_layer else {}
    x = torch.zeros(1, positions.shape[1], 1)

    def rotate(module):
        try:
            found = module(x, positions, **options)
        except (IndexError, RuntimeError):  # Qwen2-VL has positions in time, height and width: [3, B, T]
            found = module(x, positions.expand(3, -1, -1), **options)
        return found if isinstance(found, tuple) else (found,)

    pairs = zip(rotate(before), rotate(after), strict=True)
    return any(not torch.equal(old, new) for old, new in pairs)


# ------------------------------------------------------------------ an adapter's run
def scaling_of_adapters(adapters) -> str | None:
    """The `--rope_scaling` that the last of some adapters was trained with; its base's config does not have it.

    Args:
        adapters: folders, in the order they were trained.
    """
    if not adapters:
        return None
    found = read_run_note(adapters[-1], "common").get("rope_scaling")
    return found or _noted_in_checkpoint(adapters[-1])


def _noted_in_checkpoint(folder: str) -> str | None:
    """Of a checkpoint without its run's folder, by its own record."""
    manifest = read_manifest(Path(folder)) or {"settings": {}}
    return manifest["settings"].get("must", {}).get("rope_scaling")


def scaled_by_adapters(parts, trust_remote_code: bool, flag: str = "--model_path"):
    """The config of a base with the scaling that its adapters were trained with.

    Args:
        parts: with `base`, and `adapters` in the order they were trained.
    """
    return load_scaled_config(parts.base, scaling_of_adapters(parts.adapters), trust_remote_code, flag)
