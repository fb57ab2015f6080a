"""`--trainable_layers` and `--trainable_modules`: which weights full training changes."""

import re

from loguru import logger

from utils.runtime.errors import Problem, UserError, refusal

FLAGS = ("trainable_layers", "trainable_modules")


def layer_stacks(model) -> list[str]:
    """The names of the lists of layers of a model, as many as its configuration says, each with a dot at its end."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    modules = model.named_modules()
    return [f"{name}." for name, module in modules if isinstance(module, torch.nn.ModuleList) and len(module) == count]


def check_trainable(common, is_adapter: bool) -> list[Problem]:
    """Checks the flags against `--train_mode`, and the regular expression."""
    given = [name for name in FLAGS if getattr(common, name) is not None]
    if given and is_adapter:
        return refusal(
            f"--{given[0]} chooses weights for full training, and --train_mode {common.train_mode} trains an adapter; "
            "use --train_mode full, or --lora_target_modules",
            *given,
            "train_mode",
        )
    problems = []
    if common.trainable_layers == 0:
        problems += refusal(
            "--trainable_layers 0 trains no layer; give 2 for the last two, or -2 for the first two", given[0]
        )
    try:
        re.compile(common.trainable_modules or "")
    except re.error as error:
        problems += refusal(
            f"--trainable_modules {common.trainable_modules!r} is no regular expression: {error}; correct it",
            "trainable_modules",
        )
    return problems


def freeze_others(model, args, log: bool = True) -> None:
    """Freezes all weights but those of the chosen layers and modules.

    Args:
        model: the base; its weights may be on the meta device.
        args: CommonArgs. `trainable_layers` n: the last n layers, below 0 the first; `trainable_modules`: a regular
            expression that is searched in the names of weights.
        log: whether to log how much is trained.

    Raises:
        UserError: nothing would be trained.
    """
    if args.trainable_layers is None and args.trainable_modules is None:
        return
    kept = []
    if args.trainable_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        numbers = range(count)[-args.trainable_layers :] if args.trainable_layers > 0 else range(-args.trainable_layers)
        kept += [f"^{re.escape(stack)}{number}\\." for stack in layer_stacks(model) for number in numbers]
    if args.trainable_modules is not None:
        kept.append(args.trainable_modules)
    trained = total = 0
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.requires_grad and any(re.search(pattern, name) for pattern in kept))
        trained, total = trained + weight.requires_grad * weight.numel(), total + weight.numel()
    if not trained:
        example = next(name for name, _ in model.named_parameters())
        message = (
            f"--trainable_layers {args.trainable_layers}, --trainable_modules {args.trainable_modules!r}: no weight of "
            f"{type(model).__name__} is chosen; its weights have names such as {example!r}"
        )
        raise UserError(Problem(message, flags=FLAGS))
    if log:
        logger.info("{:,} of {:,} weights are trained, the others are frozen", trained, total)
