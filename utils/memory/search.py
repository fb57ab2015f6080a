"""Which settings there are to choose from, the cheapest first, and the command for each."""

import dataclasses
import shlex

from utils.config.flags import split_flags
from utils.memory.planner import Setting, modes
from utils.model.adapter import ADAPTERS, adapter_of
from utils.model.quantised import method_of, quantisation_of

LAYOUTS = ("none", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
# beside the allocator's peak: CUDA, the libraries' own memory, gaps between tensors; reckoned, not measured
RESERVE = 1_000_000_000

# what each way costs in speed, least first: splitting gradients costs next to nothing, computing activations again
# about a third, sending the weights about half, and waiting for CPU memory most of all
_LADDER = [
    ("none", False), ("zero1", False), ("zero2", False), ("none", True), ("zero1", True), ("zero2", True),
    ("zero3", False), ("zero3", True), ("zero2_offload", False), ("zero2_offload", True), ("zero3_offload", False),
    ("zero3_offload", True),
]  # fmt: skip


def modes_of(own: str) -> list[str]:
    """The kinds of training to plan, the run's own first; DoRA on a quantised base only where the run itself has it."""
    offered = [mode for mode, (name, dora) in modes().items() if not (dora and ADAPTERS[name].quantised)]
    return [own, *(mode for mode in offered if mode != own)]


def settings_of(args, train_args, own: Setting, gpus: int) -> list[Setting]:
    """Every setting to plan, from the cheapest to the dearest; what cannot be run is left out.

    Args:
        args, train_args: as parsed.
        own: the run's own setting; its kind of training comes first.
        gpus: how many; on one nothing is split, and only offloading is left.
    """
    asked = train_args.gradient_checkpointing
    ladder = [(layout, again) for layout, again in _LADDER if asked in (None, again)]
    if own.layout not in LAYOUTS:  # zero0, or a file of the user's own
        ladder = [(own.layout, again) for again in (False, True) if asked in (None, again)] + ladder
    return [
        Setting(mode, layout, again)
        for mode in modes_of(own.mode)
        for layout, again in ladder
        if _can_run(args, mode, layout)
    ]


def _can_run(args, mode: str, layout: str) -> bool:
    """Whether a run with these settings would be accepted, by the checks of its arguments."""
    train_mode, dora = modes()[mode]
    args = dataclasses.replace(args, train_mode=train_mode, use_dora=dora)
    row, saved = adapter_of(args), quantisation_of(args.model_name_or_path)
    if saved and row.quantised != (method_of(saved) == "bitsandbytes_4bit"):
        return False
    if row.is_adapter and row.check(args):
        return False
    return "zero3" not in layout or not row.check_zero3(args)


def brings_nothing(setting: Setting, gpus: int) -> bool:
    """Whether a setting splits among GPUs where there is only one."""
    return gpus == 1 and setting.layout in ("zero1", "zero2", "zero3")


def fits(total: int, gpu_memory: float | None) -> bool | None:
    """Whether so many bytes fit a GPU of so many GB (1e9 bytes), with `RESERVE` left; None where that is unknown."""
    return None if gpu_memory is None else total + RESERVE <= gpu_memory * 1e9


def command_of(setting: Setting, own: Setting, argv: list[str], gpus: int) -> str:
    """The command that trains so: the given flags, and what has to be changed.

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
