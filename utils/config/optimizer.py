"""Checks of optimizer and schedule: `--optim`, `--use_muon`, `--layerwise_lr_decay`, LoRA+."""

from utils.model.adapter import adapter_of
from utils.runtime.errors import Problem, refusal

# updates of low rank: GaLore (arXiv 2403.03507) and APOLLO (arXiv 2412.05270)
_LOW_RANK = ("galore", "apollo")


def validate(settings) -> list[Problem]:
    """Checks what would fail only after the weights are loaded, or be silently ignored."""
    common, train_args = settings.common, settings.train_args
    problems = _check_optim(train_args)
    if train_args.optim.value.startswith(_LOW_RANK):
        problems += _check_low_rank(common, train_args)
    if common.use_muon:
        problems += _check_muon(common, train_args)
    if common.layerwise_lr_decay is not None:
        problems += _check_layerwise(common, train_args)
    return problems


def _check_optim(train_args) -> list[Problem]:
    """Builds optimizer and schedule for a single weight; the trainer would do so only after the model is loaded."""
    import torch
    from transformers import Trainer, get_scheduler

    problems = []
    try:
        Trainer.get_optimizer_cls_and_kwargs(train_args)
    except ImportError as error:
        problems += refusal(f"--optim {train_args.optim.value} cannot be used: {error}", "optim")
    except ValueError:
        pass  # some optimizers need the model
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    options = train_args.lr_scheduler_kwargs or None
    try:
        get_scheduler(train_args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=options)
    except (ValueError, TypeError, AttributeError) as error:
        problems += refusal(
            f"--lr_scheduler_type {train_args.lr_scheduler_type.value} cannot be used with --lr_scheduler_kwargs "
            f"{options}: {error}",
            "lr_scheduler_type",
            "lr_scheduler_kwargs",
        )
    return problems


def _refuse_adapter(common, what: str, otherwise: str, flag: str) -> list[Problem]:
    """Refuses `--train_mode` with an adapter for what works on whole weight matrices."""
    if not adapter_of(common).is_adapter:
        return []
    message = f"{what}, and --train_mode {common.train_mode} trains an adapter; use --train_mode full, or {otherwise}"
    return refusal(message, flag, "train_mode")


def _check_low_rank(common, train_args) -> list[Problem]:
    name = train_args.optim.value
    what = f"--optim {name} projects the gradients of whole weight matrices"
    problems = _refuse_adapter(common, what, "--optim adamw_torch", "optim")
    if not train_args.optim_target_modules:
        problems += refusal(
            f"--optim {name} needs --optim_target_modules, the layers whose gradients are projected; give all-linear, "
            "or a regular expression of their names such as '.*(attn|mlp).*'",
            "optim",
            "optim_target_modules",
        )
    if name.endswith("layerwise") and train_args.gradient_accumulation_steps > 1:
        problems += refusal(
            f"--optim {name} steps within the backward pass, so that --gradient_accumulation_steps "
            f"{train_args.gradient_accumulation_steps} would not add gradients up; give 1, or --optim "
            f"{name.removesuffix('_layerwise')}",
            "optim",
            "gradient_accumulation_steps",
        )
    return problems


def _check_muon(common, train_args) -> list[Problem]:
    optim, what = train_args.optim.value, "--use_muon true orthogonalises the updates of whole weight matrices"
    problems = _refuse_adapter(common, what, "leave the flag out", "use_muon")
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        problems += refusal(
            f"--use_muon true trains all that is no weight matrix with AdamW, and --optim {optim} is given; leave one "
            "out",
            "use_muon",
            "optim",
        )
    for flag in ("deepspeed", "fsdp"):
        if getattr(train_args, flag):
            problems += refusal(
                f"--use_muon true needs whole weight matrices, which --{flag} flattens or divides; leave one out",
                "use_muon",
                flag,
            )
    return problems


def _check_layerwise(common, train_args) -> list[Problem]:
    optim, problems = train_args.optim.value, []
    if common.loraplus_lr_ratio is not None:
        problems += refusal(
            "--layerwise_lr_decay and --loraplus_lr_ratio both set the learning rates of groups of weights; give one",
            "layerwise_lr_decay",
            "loraplus_lr_ratio",
        )
    if optim.startswith((*_LOW_RANK, "lomo", "adalomo")):
        problems += refusal(
            f"--layerwise_lr_decay groups the weights, and --optim {optim} groups them in its own way; give one",
            "layerwise_lr_decay",
            "optim",
        )
    return problems
