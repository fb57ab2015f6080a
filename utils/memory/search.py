"""Which settings there are to choose from, the cheapest first, and the command for each."""

import shlex

from utils.config.flags import split_flags
from utils.memory.planner import MODES, Setting
from utils.model.adapter import ADAPTERS
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
    """The kinds of training, the run's own first."""
    return [own, *(mode for mode in MODES if mode != own)]


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
    """What utils/config/deepspeed.py, utils/config/from_adapter.py and utils/model/quantised.py refuse is no choice."""
    train_mode = MODES.get(mode, ("qlora", True))[0]
    saved = quantisation_of(args.model_name_or_path)
    if saved and (train_mode == "qlora") != (method_of(saved) == "bitsandbytes_4bit"):
        return False
    if args.init_lora_weights == "pissa" and mode != "full" and (train_mode == "qlora" or "dora" in mode):
        return False
    if "zero3" not in layout or not ADAPTERS[train_mode].lora:
        return not ("zero3" in layout and args.adapter_name_or_path)
    return args.init_lora_weights != "pissa" and args.train_special_tokens != "on"


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
    train_mode, dora = MODES.get(setting.mode, ("qlora", True))
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
