"""Optimizers beyond those of `--optim`: LoRA+, a learning rate for each layer, and Muon beside AdamW."""

import re
from collections.abc import Iterable

import torch

from utils.model.trainable import layer_stacks
from utils.runtime.errors import Problem, UserError


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices of the layers, AdamW for all other weights, as one optimizer.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of a matrix. Its
    updates are scaled to the size of AdamW's (`match_rms_adamw`, arXiv 2502.16982), so that both use one learning rate.

    Args:
        matrices: parameter groups of 2-D weights.
        others: parameter groups of the other weights.
        options: of AdamW: `betas`, `eps`.
    """

    def __init__(self, matrices: list[dict], others: list[dict], **options):
        super().__init__([*matrices, *others], {})
        # the three share their groups, so that a schedule sets the rates of all
        self._muon = torch.optim.Muon(self.param_groups[: len(matrices)], adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(self.param_groups[len(matrices) :], **options)
        self._share()

    def _share(self) -> None:
        count = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        """As `torch.optim.Optimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure=None):
        """Takes a step of both."""
        loss = None if closure is None else closure()
        self._muon.step()
        self._adamw.step()
        return loss


def create_optimizer(trainer, model):
    """Creates the optimizer of LoRA+, `--layerwise_lr_decay` or `--use_muon`; None where none of these is given.

    Args:
        trainer: a transformers Trainer with `FaultTolerantTrainerMixin`.
        model: the model whose weights are trained.
    """
    if trainer.loraplus_lr_ratio is None and trainer.layerwise_lr_decay is None and not trainer.use_muon:
        return None  # first, since making the options of GaLore by layer hooks an optimizer to each weight
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    if trainer.loraplus_lr_ratio is not None:
        from peft.optimizers import create_loraplus_optimizer

        ratio, decay = trainer.loraplus_lr_ratio, trainer.args.weight_decay
        return create_loraplus_optimizer(model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay, **options)
    decayed = set(trainer.get_decay_parameter_names(model))
    groups = parameter_groups(
        model, options.pop("lr"), trainer.args.weight_decay, decayed, trainer.layerwise_lr_decay, trainer.use_muon
    )
    matrices, others = split_groups(groups)
    if trainer.use_muon and not (matrices and others):
        what = "weight matrix of a layer" if not matrices else "other weight"
        message = f"--use_muon true trains matrices with Muon and the rest with AdamW, and no {what} is trained"
        remedy = "leave the flag out" if not matrices else "let --trainable_modules match norm as well, or leave it out"
        raise UserError(Problem(f"{message}; {remedy}", flags=("use_muon", "trainable_modules")))
    return MuonWithAdamW(matrices, others, **options) if trainer.use_muon else kind(others, **options)


def parameter_groups(
    model, rate: float, weight_decay: float, decayed: set[str], layerwise: float | None, muon: bool
) -> list[dict]:
    """Groups the trained weights by learning rate, by weight decay and, with Muon, by optimizer.

    With `layerwise`, a weight's rate is `rate` times `layerwise` to the power of its distance from the head: 0 for the
    head and the last norm, 1 for the last layer, number of layers + 1 for the embeddings, also where they are the head
    (discriminative fine-tuning, arXiv 1801.06146; as in ELECTRA, arXiv 2003.10555).

    Args:
        model: a transformers or PEFT model.
        rate: the learning rate of the head.
        weight_decay: of the weights named in `decayed`.
        decayed: names of weights.
        layerwise: None for one rate.
        muon: whether weight matrices of the layers get groups of their own.

    Returns:
        groups as torch.optim takes them, with the key `is_matrix`; the first has the highest rate.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    depth = _distances(model, [name for name, _ in trained]) if layerwise else {}
    embeddings = {
        id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module
    }
    embeddings |= {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    groups: dict[tuple, dict] = {}
    for name, weight in trained:
        is_matrix = muon and weight.ndim == 2 and id(weight) not in embeddings
        key = (depth.get(name, 0), is_matrix, name in decayed)
        group = {
            "params": [],
            "lr": rate * (layerwise or 1) ** key[0],
            "weight_decay": weight_decay if key[2] else 0.0,
            "is_matrix": is_matrix,
        }
        groups.setdefault(key, group)["params"].append(weight)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1], not key[2]))]


def split_groups(groups: list[dict]) -> tuple[list[dict], list[dict]]:
    """Splits groups into those of matrices for Muon and all others, without the key `is_matrix`."""
    split: tuple[list[dict], list[dict]] = ([], [])
    for group in groups:
        split[0 if group["is_matrix"] else 1].append({key: group[key] for key in ("params", "lr", "weight_decay")})
    return split


def _distances(model, names: Iterable[str]) -> dict[str, int]:
    """Name of a weight → its distance from the head, in layers.

    Raises:
        UserError: the model's layers are not found.
    """
    count = model.config.get_text_config().num_hidden_layers
    stacks = layer_stacks(model)
    embeddings = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or module is model.get_input_embeddings()
    ]
    found = {}
    for name in names:
        stack = next((stack for stack in stacks if name.startswith(stack)), None)
        if stack is not None:
            found[name] = count - int(re.match(r"\d+", name.removeprefix(stack))[0])
        else:
            found[name] = count + 1 if name.startswith(tuple(embeddings)) else 0
    if not any(0 < distance <= count for distance in found.values()):
        message = (
            f"--layerwise_lr_decay: the {count} layers of {type(model).__name__} are not found, or none of them is "
            "trained; leave the flag out"
        )
        raise UserError(Problem(message, flags=("layerwise_lr_decay",)))
    return found
