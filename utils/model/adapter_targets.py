"""Which layers get an adapter: every linear layer of the text model, except its head and its routers."""

import re
from dataclasses import dataclass, field

from loguru import logger

from utils.model.expert_targets import expert_parameters
from utils.model.parts import (
    frozen_tensors,
    is_conv1d,
    is_plain,
    linear_layers,
    numberless,
    routers_of,
    towers_of,
    unreached,
)
from utils.runtime.errors import UserError

ALL_LINEAR = "all-linear"  # PEFT's name for the default


@dataclass(frozen=True)
class Targets:
    """Where adapters go.

    Attributes:
        layers: the full names of the layers.
        target_modules, exclude_modules, fan_in_fan_out: of `peft.LoraConfig`; together they match `layers` exactly.
        left: why a layer gets none → the names of such layers, `N` for their numbers.
    """

    layers: frozenset[str]
    target_modules: list[str]
    exclude_modules: str | None
    fan_in_fan_out: bool
    left: dict[str, list[str]] = field(default_factory=dict)


def find_targets(model, chosen: str | None) -> Targets:
    """Finds the layers that get an adapter.

    Args:
        model: the base; its weights may be on the meta device.
        chosen: `--lora_target_modules`: names separated by commas; a regular expression of full names, as PEFT has it;
            None or `all-linear` for every linear layer that can have an adapter.

    Raises:
        UserError: a chosen name is not of a layer that can be adapted, or none can be.
    """
    linear = linear_layers(model)
    why = _unfit(model, linear)
    wanted = [name.strip() for name in (chosen or "").split(",") if name.strip()]
    if chosen in (None, ALL_LINEAR):
        routers = routers_of(model)
        why = {name: "a router of experts" for name in linear if name in routers} | why
        why |= unreached(model, [name for name in linear if name not in why])
        layers = [name for name in linear if name not in why]
    else:
        wanted = [] if _is_pattern(chosen) else wanted
        layers = _chosen(chosen, wanted, linear, why)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layer that PEFT can adapt ({_reasons(why, model) or 'none is linear'}); "
            "use --train_mode full"
        )
    modules = dict(model.named_modules())
    targets = [name for name in wanted if name != ALL_LINEAR] or sorted({_ending(name) for name in layers})
    conv1d = {is_conv1d(modules[name]) for name in layers}
    return Targets(
        layers=frozenset(layers),
        target_modules=targets,
        exclude_modules=_exclusion(modules, targets, layers),
        fan_in_fan_out=conv1d == {True},
        left=_by_reason(why, model),
    )


def log_untouched(targets: Targets, model, chosen: str | None, lora_experts: bool = False) -> None:
    """Logs which layers get no adapter and why, and each large part of the weights that no adapter reaches.

    Args:
        targets, model, chosen: of `find_targets`.
        lora_experts: whether the experts have adapters.
    """
    if chosen in (None, ALL_LINEAR):
        for reason, names in targets.left.items():
            logger.info("no adapter on {} ({})", ", ".join(names), reason)
    experts = {numberless(name.rpartition(".")[0]) for name in expert_parameters(model)}
    for name, share in frozen_tensors(model):
        if not (lora_experts and name in experts):
            logger.warning(
                "{} holds {:.0f} % of the model's weights in tensors of its own rather than in linear layers; no "
                "adapter goes there, so they stay as they are{}",
                name,
                100 * share,
                "; --lora_experts true trains them" if name in experts else "",
            )


# ------------------------------------------------------------------ what PEFT can adapt
def _unfit(model, linear: dict) -> dict[str, str]:
    """Layer → why an adapter on it would be wrong, or trained for nothing, or is refused by PEFT."""
    towers = tuple(f"{name}." for name in towers_of(model))
    refused = {ending: _refused_by_peft(model, ending) for ending in {_ending(name) for name in linear}}
    lost = _lost_by_peft(model, list(linear))
    found = {}
    for name, module in linear.items():
        if f"{name}.".startswith(towers):
            found[name] = "only text is trained"
        elif not is_plain(module):
            found[name] = "it computes something else than W x + b"
        elif refused[_ending(name)]:
            found[name] = refused[_ending(name)]
        elif name in lost:
            found[name] = f"PEFT would not find it again in a saved adapter of {model.config.model_type}"
    return found


def _refused_by_peft(model, name: str) -> str | None:
    """Why PEFT does not adapt layers that are named so in this model; None where it does.

    It renames the targets of some mixtures, whose experts were linear layers of these names in transformers 4, to
    their experts; and some state space models read the weights of a layer rather than call it.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    kind = model.config.model_type
    config = LoraConfig(target_modules=[name])
    try:
        _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
    except ValueError:
        return f"PEFT refuses it in {kind}, which reads its weight without calling it"
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # gate_proj without up_proj
        config.target_modules = set()
    return None if config.target_modules == {name} else f"PEFT takes its name for the experts of {kind}"


def _lost_by_peft(model, names: list[str]) -> set[str]:
    """Layers whose adapter PEFT renames when it is loaded, to a name that the model does not have.

    It applies the patterns by which transformers reads older checkpoints of an architecture, and some of them match
    today's names as well.
    """
    import torch
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    # both halves, since some patterns want them together
    keys = {f"base_model.model.{name}.lora_{half}.weight": name for name in names for half in "AB"}
    weights = {key: torch.empty(2, 2, device="meta") for key in keys}
    found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), weights)
    return {name for key, name in keys.items() if key not in found}


def _is_pattern(chosen: str) -> bool:
    """Whether a value is a regular expression rather than names."""
    return re.search(r"[\\^$*+?{}\[\]|()]", chosen) is not None


def _matching(pattern: str, linear: dict, why: dict) -> list[str]:
    """The layers whose full names a regular expression matches."""
    try:
        found = [layer for layer in linear if re.fullmatch(pattern, layer)]
    except re.error as error:
        raise UserError(
            f"--lora_target_modules {pattern!r} is no regular expression: {error}; correct it, or give names"
        ) from error
    if layers := [layer for layer in found if layer not in why]:
        return layers
    reason = f"it matches {found[0]}, which cannot have an adapter: {why[found[0]]}" if found else "it matches none"
    raise UserError(
        f"--lora_target_modules {pattern!r}: a regular expression must match the full name of a linear layer, such as "
        f"{next(iter(linear))!r}, and {reason}"
    )


def _chosen(chosen: str, wanted: list[str], linear: dict, why: dict) -> list[str]:
    """The layers that `--lora_target_modules` names."""
    if _is_pattern(chosen):
        return _matching(chosen, linear, why)
    matched = {name: [layer for layer in linear if _matches(layer, [name])] for name in wanted}
    endings = sorted({_ending(layer) for layer in linear if layer not in why})
    unknown = [name for name, layers in matched.items() if not layers]
    if unknown or not wanted:
        raise UserError(
            f"--lora_target_modules {chosen!r}: no linear layer to adapt is named {', '.join(map(repr, unknown))}. "
            f"The model has {', '.join(endings)}"
        )
    unfit = {name: why[layers[0]] for name, layers in matched.items() if all(layer in why for layer in layers)}
    if unfit:
        what = "; ".join(f"{name!r} cannot have an adapter: {reason}" for name, reason in unfit.items())
        raise UserError(f"--lora_target_modules {chosen!r}: {what}. Those that can are {', '.join(endings)}")
    return [layer for layer in linear if layer not in why and _matches(layer, wanted)]


# ------------------------------------------------------------------ names
def _ending(name: str) -> str:
    """The end of a name that says what it is: `q_proj`, `altup_projections.0`."""
    parts = name.split(".")
    last = max((place for place, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[last:])


def _matches(name: str, targets: list[str]) -> bool:
    """As PEFT matches names with `target_modules`."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _exclusion(modules: dict, targets: list[str], layers: list[str]) -> str | None:
    """A pattern of all that the targets match beside the layers, for `exclude_modules`."""
    spared = {name for name in modules if _matches(name, targets)} - set(layers)
    kept = set(layers)
    patterns = set()
    for name in spared:
        pattern = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
        patterns.add(re.escape(name) if any(re.fullmatch(pattern, layer) for layer in kept) else pattern)
    return "|".join(sorted(patterns)) or None


def _by_reason(why: dict[str, str], model) -> dict[str, list[str]]:
    """Why → the layers, without their numbers; a tower stands for all of its own."""
    towers = towers_of(model)
    reasons: dict[str, list[str]] = {}
    for name, reason in why.items():
        tower = next((tower for tower in towers if f"{name}.".startswith(f"{tower}.")), None)
        names = reasons.setdefault(reason, [])
        if (short := tower or numberless(name)) not in names:
            names.append(short)
    return reasons


def _reasons(why: dict[str, str], model) -> str:
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in _by_reason(why, model).items())
