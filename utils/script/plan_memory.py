"""Plans the memory of a training run on each GPU, from the model's config.json alone: no weights, no GPU.

python -m utils.script.plan_memory --model_name_or_path Qwen/Qwen1.5-7B --gpus 2 --gpu_memory 24
python -m utils.script.plan_memory --train_mode qlora --max_len 2048 --json true   # and any flag of main_train.py
"""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Literal

from utils.args import parse_args
from utils.config.deepspeed import ALLOWED, NAMES
from utils.config.flags import arg, make_parser, read_flags, split_flags
from utils.memory import Estimate, Planner, Setting
from utils.memory.planner import batch_of
from utils.memory.search import LAYOUTS, RESERVE, brings_nothing, command_of, fits, modes_of, settings_of
from utils.runtime.command import run_command
from utils.runtime.errors import UserError, nearest, raise_if_any
from utils.runtime.log import setup_logging
from utils.storage.files import project_path

PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
# of main_train.py's flags those that say nothing of memory, and may name what is not on this machine
_NOT_NEEDED = ("train_data_path", "eval_data_path", "val_size", "output_dir", "cache_dir", "resume_from_checkpoint",
               "report_to", "overwrite_output_dir", "push_to_hub", "hub_model_id")  # fmt: skip


@dataclass
class PlanArgs:
    """Flags of this command; all others are main_train.py's."""

    gpus: int = arg(1, "How many GPUs train together, 1 to 8.")
    gpu_memory: float | None = arg(
        None, "Memory of each GPU in GB; by default that of this machine's GPU, if it has one. Marks what fits."
    )
    tokens_per_row: int | None = arg(
        None, "Tokens of each row of a step. Default: --max_len, the longest there can be."
    )
    trained_share: float = arg(
        1.0, "Share of the tokens that are trained: those of answers. Default: all, the worst case."
    )
    logits: Literal["tiles", "whole"] = arg(
        "tiles", "tiles: the head as this project computes it. whole: all logits at once in float32, as elsewhere."
    )
    json: bool = arg(False, "Print JSON, bytes in place of GB.")


@dataclass(frozen=True)
class Row:
    """A setting, its memory, and whether it fits; None where the GPU's memory is not known."""

    setting: Setting
    estimate: Estimate
    fits: bool | None


def _split(argv: list[str]) -> tuple[list[str], list[str], dict]:
    """This command's flags, main_train.py's, and of those the ones that are settled here."""
    own = {f"--{name}" for name in PlanArgs.__dataclass_fields__} | {"--help", "-h"}
    mine, theirs, settled = [], [], {}
    for group in split_flags(argv):
        name, _, value = group[0].partition("=")
        flag = name.removeprefix("--")
        value = value or (group[1] if len(group) > 1 else "")
        if name in own:
            mine += group
        elif flag in _NOT_NEEDED:
            continue
        elif flag == "deepspeed" or (flag == "precision" and value in ("auto", "bf16", "fp16", "fp32")):
            settled[flag] = value
        elif flag == "attn_implementation" and value == "flash_attention_2":
            continue  # keeps what PyTorch's own attention keeps
        else:
            theirs += group
    return mine, theirs, settled


def _check(plan: PlanArgs, settled: dict) -> list[str]:
    problems = []
    if not 1 <= plan.gpus <= 8:
        problems.append(f"--gpus {plan.gpus} is not allowed; give a whole number from 1 to 8")
    if plan.gpu_memory is not None and not 0 < plan.gpu_memory < 10_000:
        problems.append(f"--gpu_memory {plan.gpu_memory:g} is not allowed; give the GB of one GPU, 24 for example")
    if plan.tokens_per_row is not None and plan.tokens_per_row < 2:
        problems.append(f"--tokens_per_row {plan.tokens_per_row} is not allowed; give a whole number of at least 2")
    if not 0 < plan.trained_share <= 1:
        problems.append(f"--trained_share {plan.trained_share:g} is not allowed; give more than 0 and at most 1")
    layout = settled.get("deepspeed", "none")
    if layout not in ("none", *NAMES) and not layout.endswith(".json"):
        problems.append(f"--deepspeed {layout!r} cannot be planned.{nearest(layout, NAMES)} Allowed: a file, {ALLOWED}")
    return problems


def read(argv: list[str]):
    """The arguments of a plan.

    Returns:
        (PlanArgs, CommonArgs, TrainArgument, main_train.py's flags as given)

    Raises:
        UserError: with every problem at once.
    """
    mine, theirs, settled = _split(argv)
    values, _, problems = read_flags(make_parser([PlanArgs], "utils.script.plan_memory", __doc__), mine)
    plan = PlanArgs(**values)
    problems += _check(plan, settled)
    try:
        args, train_args = parse_args(theirs, needs_weights=False)
    except UserError as error:
        raise UserError(*problems, *error.problems) from error
    raise_if_any(problems)
    _settle(args, train_args, settled, {group[0].partition("=")[0] for group in split_flags(theirs)})
    if plan.tokens_per_row is not None:
        args.max_len = plan.tokens_per_row
    if plan.gpu_memory is None:
        plan.gpu_memory = _memory_here()
    own = {f"--{name}" for name in PlanArgs.__dataclass_fields__}
    given = [word for group in split_flags(argv) if group[0].partition("=")[0] not in own for word in group]
    return plan, args, train_args, given


def _settle(args, train_args, settled: dict, given: set[str]) -> None:
    """Precision and layout of the plan, which is for GPUs, whatever this machine can do."""
    asked = settled.get("precision", "auto")
    if asked != "auto":
        args.precision = asked
    elif not given & {"--bf16", "--fp16", "--config"}:
        args.precision = "bf16"
    layout = settled.get("deepspeed")
    if layout is not None:
        file = project_path(layout) if layout.endswith(".json") else layout
        train_args.deepspeed = None if layout == "none" else file


def _memory_here() -> float | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else None


def make_plan(plan: PlanArgs, args, train_args) -> tuple[Planner, list[Row]]:
    """Estimates every setting, telling on stderr how far it is."""
    import dataclasses

    batch = batch_of(args, train_args, whole_logits=plan.logits == "whole")
    planner = Planner(args, train_args, plan.gpus, dataclasses.replace(batch, trained=plan.trained_share))
    settings, rows = settings_of(args, train_args, planner.own(), plan.gpus), []
    for number, setting in enumerate(settings, 1):
        if sys.stderr.isatty():
            print(f"\rsetting {number} of {len(settings)} ", end="", file=sys.stderr, flush=True)
        estimate = planner.estimate(setting)
        rows.append(Row(setting, estimate, fits(estimate.total, plan.gpu_memory)))
    if sys.stderr.isatty():
        print("\r" + " " * 40, end="\r", file=sys.stderr)
    return planner, rows


def cheapest(rows: list[Row], gpus: int) -> Row | None:
    """The first that fits; `settings_of` has them in this order."""
    return next((row for row in rows if row.fits and not brings_nothing(row.setting, gpus)), None)


def table(rows: list[Row], own: Setting) -> str:
    """Kinds of training × what is split, GB on each GPU; ✓ where it fits."""
    layouts = [
        layout for layout in dict.fromkeys([own.layout, *LAYOUTS]) if any(r.setting.layout == layout for r in rows)
    ]
    layouts.sort(key=lambda name: LAYOUTS.index(name) if name in LAYOUTS else -1)
    found = {row.setting: row for row in rows}
    divisor, unit = _unit(max(row.estimate.total for row in rows))
    lines = [f"{unit + ' on each GPU':<32}" + "".join(f"{name[-14:]:>15}" for name in layouts)]
    for mode in modes_of(own.mode):
        for again in (False, True):
            cells = [found.get(Setting(mode, layout, again)) for layout in layouts]
            if any(cells):
                name = f"{mode}, gradient checkpointing" if again else mode
                lines.append(f"{name:<32}" + "".join(f"{_cell(row, divisor):>15}" for row in cells))
    return "\n".join(lines)


def _unit(largest: int) -> tuple[float, str]:
    """What bytes are divided by, and its name; a model to try things with has no tenth of a GB."""
    return (1e9, "GB") if largest >= 1e8 else (1e6, "MB")


def _said(amount: int) -> str:
    divisor, unit = _unit(abs(amount))
    return f"{amount / divisor:>8.2f} {unit}"


def _cell(row: Row | None, divisor: float) -> str:
    return "–" if row is None else f"{row.estimate.total / divisor:.1f}{' ✓' if row.fits else '  '}"


def formula(row: Row) -> str:
    """Each part with the numbers in it, and their sum."""
    found = row.estimate
    again = ", gradient checkpointing" if row.setting.checkpointing else ""
    lines = [f"{row.setting.mode}, {row.setting.layout}{again}:"]
    for part in PARTS:
        lines.append(f"  {part:<12} {_said(getattr(found, part))} = {found.words.get(part, '')}")
    if found.overlap:
        lines.append(f"  {'overlap':<12} {_said(-found.overlap)} = activations gone before all gradients are there")
    lines.append(f"  {'total':<12} {_said(found.total)} on each GPU")
    if found.host:
        lines.append(f"  {'CPU memory':<12} {_said(found.host)} for each GPU")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    plan, args, train_args, given = read(list(sys.argv[1:] if argv is None else argv))
    planner, rows = make_plan(plan, args, train_args)
    own, best = planner.own(), cheapest(rows, plan.gpus)
    command = command_of(best.setting, own, given, plan.gpus) if best else None
    batch = planner.batch
    if plan.json:
        told = {
            "model": args.model_name_or_path, "weights": planner.weights, "gpus": plan.gpus,
            "gpu_memory": plan.gpu_memory, "precision": args.precision, "batch": asdict(batch), "reserve": RESERVE,
            "settings": [
                {**asdict(row.setting), **asdict(row.estimate), "total": row.estimate.total, "fits": row.fits}
                for row in rows
            ],
            "own": asdict(own), "cheapest": asdict(best.setting) if best else None, "command": command,
        }  # fmt: skip
        print(json.dumps(told, indent=1, ensure_ascii=False))
        return
    where = "one GPU" if plan.gpus == 1 else f"each of {plan.gpus} GPUs"
    print(f"{args.model_name_or_path}: {planner.weights:,} weights, {args.precision}, {batch} a step on {where}\n")
    print(table(rows, own) + "\n")
    shown = best or next((row for row in rows if row.setting == own), rows[0])
    print(formula(shown) + "\n")
    if best:
        print(f"cheapest that fits {plan.gpu_memory:g} GB, {RESERVE / 1e9:g} GB of it left to CUDA:\n  {command}")
    elif plan.gpu_memory is None:
        print("give --gpu_memory, the GB of one GPU, to see what fits and the command for it")
    else:
        least = min(rows, key=lambda row: row.estimate.total)
        print(
            f"nothing fits {plan.gpu_memory:g} GB; the least is {least.estimate.total / 1e9:.1f} GB. Lower --max_len "
            "or --per_device_train_batch_size, or take more GPUs"
        )


if __name__ == "__main__":
    run_command(main)
