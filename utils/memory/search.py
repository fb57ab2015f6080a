"""Lists the settings to choose from, fastest first, and the command for each."""

import dataclasses
import shlex

from utils.config.flags import split_flags
from utils.memory.planner import Setting, modes
from utils.model.adapter import ADAPTERS, adapter_of
from utils.model.quantised import method_of, quantisation_of

LAYOUTS = ("none", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
# on top of the allocator's peak: CUDA, the libraries' own memory, fragmentation; an assumption, not measured
RESERVE = 1_000_000_000

# (layout, gradient checkpointing), fastest first: sharding gradients costs next to nothing, recomputing activations
# about a third, gathering sharded weights about half, and waiting for CPU memory most
_LADDER = [
    ("none", False), ("zero1", False), ("zero2", False), ("none", True), ("zero1", True), ("zero2", True),
    ("zero3", False), ("zero3", True), ("zero2_offload", False), ("zero2_offload", True), ("zero3_offload", False),
    ("zero3_offload", True),
]  # fmt: skip


def modes_of(own: str) -> list[str]:
    """The training modes to plan, the run's own first; DoRA on a quantised base only if it is the run's own."""
    offered = [mode for mode, (name, dora) in modes().items() if not (dora and ADAPTERS[name].quantised)]
    return [own, *(mode for mode in offered if mode != own)]


def settings_of(args, train_args, own: Setting, gpus: int) -> list[Setting]:
    """Every setting to plan, fastest first; settings that a run would refuse are left out.

    Args:
        args, train_args: as parsed.
        own: the run's own setting; its training mode comes first.
        gpus: how many.
    """
    given = train_args.gradient_checkpointing
    ladder = list(_LADDER)
    if own.layout not in LAYOUTS:  # zero0, or a file of the user's own
        ladder = [(own.layout, False), (own.layout, True), *ladder]
    return [
        Setting(mode, layout, checkpointing)
        for mode in modes_of(own.mode)
        for layout, checkpointing in ladder
        if given in (None, checkpointing) and _can_run(args, mode, layout)
    ]


def _can_run(args, mode: str, layout: str) -> bool:
    """Whether the checks of a run's arguments would accept these settings."""
    train_mode, dora = modes()[mode]
    args = dataclasses.replace(args, train_mode=train_mode, use_dora=dora)
    row, saved = adapter_of(args), quantisation_of(args.model_name_or_path)
    if saved and row.quantised != (method_of(saved) == "bitsandbytes_4bit"):
        return False
    if row.is_adapter and row.check(args):
        return False
    return "zero3" not in layout or not row.check_zero3(args)


def is_useless(setting: Setting, gpus: int) -> bool:
    """Whether a setting only shards over GPUs, of which there is one."""
    return gpus == 1 and setting.layout in ("zero1", "zero2", "zero3")


def fits(total: int, gpu_memory: float | None) -> bool | None:
    """Whether `total` bytes and `RESERVE` fit a GPU of `gpu_memory` GB (1e9 bytes); None if its memory is not known."""
    return None if gpu_memory is None else total + RESERVE <= gpu_memory * 1e9


def command_of(setting: Setting, own: Setting, argv: list[str], gpus: int) -> str:
    """The command that trains with a setting: the given flags, and those that change.

    `deepspeed --num_gpus 2 main_train.py --train_mode qlora --deepspeed zero2`

    Args:
        setting: what to run.
        own: what the flags describe.
        argv: the flags as given, for main_train.py.
        gpus: how many.
    """
    train_mode, dora = modes()[setting.mode]
    changes = {}
    if setting.mode != own.mode:
        changes["train_mode"] = train_mode
        changes["use_dora"] = "true" if dora else None
    if setting.checkpointing != own.checkpointing:
        changes["gradient_checkpointing"] = str(setting.checkpointing).lower()
    changes["deepspeed"] = None if setting.layout == "none" else setting.layout
    kept = [
        word
        for group in split_flags(argv)
        if group[0].partition("=")[0].removeprefix("--") not in changes
        for word in group
    ]
    words = [word for name, value in changes.items() if value is not None for word in (f"--{name}", value)]
    if gpus == 1:
        start = ["python", "main_train.py"]
    elif setting.layout == "none":
        start = ["torchrun", "--nproc_per_node", str(gpus), "main_train.py"]
    else:
        start = ["deepspeed", "--num_gpus", str(gpus), "main_train.py"]
    return shlex.join([*start, *kept, *words])
