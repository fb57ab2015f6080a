"""How a model is sharded over GPUs and stored: DeepSpeed's stages, bytes of weights and of optimizer states."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from utils.config.deepspeed import CONFIGS
from utils.model.meta import is_quantised
from utils.runtime.errors import UserError

BLOCK, NESTED_BLOCK = 64, 256  # weights per scale in NF4, and scales per second-level scale (QLoRA, section 3)


@dataclass(frozen=True)
class Layout:
    """How many GPUs train together, and what DeepSpeed shards.

    Attributes:
        name: none (data parallel, or one GPU), or a short name of `--deepspeed`.
        processes: how many GPUs.
        config: the DeepSpeed file's `zero_optimization`.
    """

    name: str
    processes: int
    config: dict = field(default_factory=dict, compare=False)

    @property
    def laid_out(self) -> bool:
        return self.name != "none"

    @property
    def stage(self) -> int:
        return self.config.get("stage", 0)

    def offloads(self, what: str) -> bool:
        """Whether `what`, `optimizer` or `param`, is kept in CPU memory."""
        return (self.config.get(f"offload_{what}") or {}).get("device", "none") != "none"

    def figure(self, name: str, default: float, when_auto: int) -> int:
        """A size in the file, in weights; `when_auto` is what transformers sets for `auto`."""
        value = self.config.get(name, default)
        return int(when_auto if value == "auto" else value)


def layout_of(name: str, processes: int) -> Layout:
    """`layout_of("zero2", 2)`, or by the path of a DeepSpeed file.

    Raises:
        UserError: the file cannot be read.
    """
    if name == "none":
        return Layout(name, processes)
    file = CONFIGS / f"ds_config_{name}.json" if not name.endswith(".json") else Path(name)
    try:
        return Layout(name, processes, json.loads(file.read_text(encoding="utf-8"))["zero_optimization"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--deepspeed {name!r} cannot be planned for: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Weight:
    """A weight of the model, as it is stored without sharding.

    Attributes:
        numel: elements of the stored tensor; of a 4-bit weight, of the packed one.
        size: bytes of each element.
        scales: bytes of the scales and code tables of a 4-bit weight, else 0.
        trained: whether it requires a gradient.
    """

    numel: int
    size: float
    scales: int
    trained: bool

    @property
    def bytes(self) -> int:
        return int(self.numel * self.size) + self.scales


def weights_of(model, layout: Layout, compute_size: int) -> list[Weight]:
    """Lists the weights, tied ones once.

    Args:
        model: from `meta_model`.
        compute_size: bytes of a number in the dtype of the computation, as which DeepSpeed stores 4-bit weights.
    """
    found = []
    for weight in model.parameters():
        if is_quantised(weight):
            parts = quantised_bytes(weight.numel())
            size = compute_size if layout.laid_out else 1
            found.append(Weight(parts.packed // size, size, parts.scales + parts.codes, False))
        else:
            found.append(Weight(weight.numel(), weight.element_size(), 0, weight.requires_grad))
    return found


def optimizer_groups(args, train_args, model) -> list[list]:
    """The trained weights in the trainer's parameter groups: with and without weight decay, for LoRA+ also by rate."""
    from transformers import Trainer

    if args.loraplus_lr_ratio is not None:
        import torch
        from peft.optimizers import create_loraplus_optimizer

        optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=args.loraplus_lr_ratio)
        return [group["params"] for group in optimizer.param_groups if group["params"]]
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    if args.use_muon or args.layerwise_lr_decay:
        from utils.train.optimizers import parameter_groups

        groups = parameter_groups(model, 1.0, 1.0, decayed, args.layerwise_lr_decay, args.use_muon)
        return [group["params"] for group in groups]
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups = [[weight for name, weight in trained if (name in decayed) is decays] for decays in (True, False)]
    return [group for group in groups if group]


def muon_states(args, train_args, model) -> int:
    """Bytes of the states of `MuonWithAdamW`: a momentum for each number of a matrix, AdamW's states for the others."""
    from utils.train.optimizers import parameter_groups, split_groups

    split = split_groups(parameter_groups(model, 1.0, 1.0, set(), None, muon=True))
    matrices, others = ([weight for group in groups for weight in group["params"]] for groups in split)
    return sum(weight.numel() * weight.element_size() for weight in matrices) + optimizer_states(train_args, others)


def optimizer_states(train_args, tensors: list) -> int:
    """Bytes of the optimizer's states, measured by a step on the meta device.

    Args:
        tensors: on the meta device.

    Raises:
        UserError: this `--optim` cannot step there.
    """
    import torch
    from transformers import Trainer

    name = getattr(train_args.optim, "value", train_args.optim)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(train_args)
        options = {key: value for key, value in options.items() if key not in ("fused", "foreach")}
        copies = [torch.nn.Parameter(torch.empty_like(tensor, device="meta")) for tensor in tensors]
        optimizer = kind(copies, **options)
        if hasattr(optimizer, "init_state"):  # bitsandbytes: its kernels need a GPU, its states do not
            for index, copy in enumerate(copies):
                optimizer.init_state(optimizer.param_groups[0], copy, 0, index)
        else:
            for copy in copies:
                copy.grad = torch.empty_like(copy)
            optimizer.step()
    except Exception as error:  # every optimizer raises its own
        raise UserError(
            f"--optim {name} cannot be planned for ({type(error).__name__}: {error}); use adamw_torch, or another "
            "that torch has"
        ) from error
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(value.numel() * value.element_size() for value in states)


def optim_name(train_args) -> str:
    return str(getattr(train_args.optim, "value", train_args.optim))


def each_size(trained: list) -> str:
    return " + ".join(_by_size([(weight.numel(), weight.element_size()) for weight in trained]))


def _by_size(pairs: list[tuple[int, float]]) -> list[str]:
    sizes: dict = {}
    for numel, size in pairs:
        sizes[size] = sizes.get(size, 0) + numel
    return [f"{numel:,} × {size:g} B" for size, numel in sizes.items()]


def sizes_of(weights: list[Weight]) -> str:
    """`7,721,324,544 × 2 B + 39,976,960 × 4 B`"""
    texts = _by_size([(weight.numel, weight.size) for weight in weights if not weight.scales])
    packed = [weight for weight in weights if weight.scales]
    if packed:
        numbers = sum(int(weight.numel * weight.size) for weight in packed) * 2
        texts.insert(0, f"{numbers:,} × 0.5 B + {sum(weight.scales for weight in packed):,} B of their scales")
    return " + ".join(texts)


@dataclass(frozen=True)
class Quantised:
    """The bytes of a linear layer's weight in bitsandbytes' NF4 with double quantisation.

    Attributes:
        packed: bytes of the 4-bit numbers, two a byte.
        scales: bytes of the 8-bit scales of each 64 weights, the float32 scales of each 256 of those, and the offset.
        codes: bytes of the two code tables, 16 and 256 float32.
    """

    packed: int
    scales: int
    codes: int

    @property
    def bytes(self) -> int:
        return self.packed + self.scales + self.codes


def quantised_bytes(weights: int) -> Quantised:
    """`quantised_bytes(256 * 704)` → 90,112 packed, 2,816 + 44 + 4 of scales, 64 + 1,024 of codes."""
    blocks = math.ceil(weights / BLOCK)
    return Quantised((weights + 1) // 2, blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4, 4 * (16 + 256))
