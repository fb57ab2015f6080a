"""What an adapter trains of a mixture of experts beside its linear layers: the experts' tensors and the routers.

transformers 5 keeps the experts of a layer in parameters of three dimensions and most routers in modules that are not
`torch.nn.Linear`, so that neither gets an adapter as a linear layer does.
"""

import copy

from loguru import logger

from utils.model.parts import EXPERT, numberless, routers_of, towers_of
from utils.runtime.errors import Problem, UserError


def expert_parameters(model) -> list[str]:
    """Finds the parameters that hold all experts of a layer, [experts, rows, columns]; empty for a dense model.

    Args:
        model: transformers' model; its weights may be on the meta device.

    Returns:
        their full names: `["model.layers.0.mlp.experts.gate_up_proj", …]`.
    """
    towers = tuple(f"{name}." for name in towers_of(model))
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if EXPERT.search(name.rpartition(".")[2]) or EXPERT.search(type(module).__name__)
        for parameter, weight in module.named_parameters(recurse=False)
        # ZeRO-3 leaves an empty tensor in place of one that it splits
        if len(getattr(weight, "ds_shape", weight.shape)) == 3 and not name.startswith(towers)
    ]


def router_modules(model) -> list[str]:
    """Finds the modules that choose experts, and the gates of shared experts; empty for a dense model.

    Args:
        model: transformers' model; its weights may be on the meta device.

    Returns:
        their full names, without the modules within them: `["model.layers.0.mlp.gate", …]`.
    """
    found, towers = routers_of(model), tuple(f"{name}." for name in towers_of(model))
    return [
        name
        for name, module in model.named_modules()
        if name in found and name.rpartition(".")[0] not in found and not name.startswith(towers)
        if any(True for _ in module.parameters())
    ]


def peft_options(args, model) -> dict[str, list[str]]:
    """The options of `peft.LoraConfig` for `--lora_experts` and `--train_router`; empty where neither is set.

    Routers are trained as a copy of their weights (`modules_to_save`): a matrix of [experts, hidden size] has about as
    few weights as a pair of low-rank matrices, and most routers are no linear layer, which LoRA would need.

    Raises:
        UserError: the model has no experts, or no routers, that can be trained so.
    """
    options, name = {}, type(model).__name__
    if args.lora_experts:
        chosen = expert_parameters(model)
        if not chosen:
            reason = "has no experts" if not routers_of(model) else "keeps its experts in no tensor of three dimensions"
            raise UserError(
                Problem(f"--lora_experts true: {name} {reason}; leave the flag out", flags=("lora_experts",))
            )
        every = [parameter for parameter, _ in model.named_parameters()]
        options["target_parameters"] = _endings(chosen, every, ".")
    if args.train_router:
        chosen = router_modules(model)
        if not chosen:
            message = f"--train_router true: {name} has no router of experts; leave the flag out"
            raise UserError(Problem(message, flags=("train_router",)))
        options["modules_to_save"] = _endings(chosen, [module for module, _ in model.named_modules()], "")
    return options


def log_experts(args, model) -> None:
    """Logs which parameters of experts have adapters, and which routers are trained."""
    if args.lora_experts:
        names = expert_parameters(model)
        logger.info("adapters on the experts: {}", ", ".join(dict.fromkeys(map(numberless, names))))
    if args.train_router:
        names = router_modules(model)
        logger.info("trained in full, with --train_router true: {}", ", ".join(dict.fromkeys(map(numberless, names))))


def freeze_constants(model) -> None:
    """Freezes the copies of parameters that the base does not train by gradients.

    PEFT marks every parameter of a module to save as trained, also a router's correction bias, which gets no gradient;
    processes that train together would wait for it.

    Args:
        model: peft.PeftModel
    """
    import torch
    from peft.utils.other import ModulesToSaveWrapper

    copies = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    if not copies:
        return
    base = model.get_base_model()
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        fresh = type(base)(copy.deepcopy(base.config))  # PEFT has frozen all of `base`
    constant = {name for name, weight in fresh.named_parameters() if not weight.requires_grad}
    for module_name, module in copies.items():
        for name, weight in module.modules_to_save.named_parameters():
            _, _, own = name.partition(".")
            place = f"{module_name.removeprefix('base_model.model.')}.{own}"
            if place in constant:
                weight.requires_grad_(False)


def _endings(chosen: list[str], every: list[str], separator: str) -> list[str]:
    """The shortest ends of names, of two parts or more, that match the chosen names and no others.

    Args:
        chosen: full names.
        every: all names that PEFT compares with the ends.
        separator: what PEFT wants before an end: `"."` for `target_parameters`, nothing for `modules_to_save`.

    Returns:
        sorted: `["experts.down_proj", "experts.gate_up_proj"]`.
    """
    others = set(every) - set(chosen)

    def shortest(name: str) -> str:
        parts = name.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts) - 2, 0, -1))
        return next((end for end in ends if not any(other.endswith(separator + end) for other in others)), name)

    return sorted({shortest(name) for name in chosen})
