"""Formats the memory plan of plan_memory: a table of settings, one setting as a sum, and JSON."""

import sys
from dataclasses import asdict, dataclass

from utils.memory import Estimate, Planner, Setting
from utils.memory.fake import Batch
from utils.memory.search import LAYOUTS, RESERVE, fits, is_useless, modes_of, settings_of

PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")


@dataclass(frozen=True)
class Row:
    """A setting, its memory, and whether it fits; None where the GPU's memory is not known."""

    setting: Setting
    estimate: Estimate
    fits: bool | None


def make_plan(args, train_args, gpus: int, gpu_memory: float | None, batch: Batch) -> tuple[Planner, list[Row]]:
    """Estimates the memory of every setting; progress is shown on stderr.

    Args:
        args, train_args: of the run.
        gpus: how many GPUs train together.
        gpu_memory: of each, in GB; None if it is not known.
        batch: the batch of a step.
    """
    planner = Planner(args, train_args, gpus, batch)
    settings, rows = settings_of(args, train_args, planner.own(), gpus), []
    for number, setting in enumerate(settings, 1):
        if sys.stderr.isatty():
            print(f"\rsetting {number} of {len(settings)} ", end="", file=sys.stderr, flush=True)
        estimate = planner.estimate(setting)
        rows.append(Row(setting, estimate, fits(estimate.total, gpu_memory)))
    if sys.stderr.isatty():
        print("\r" + " " * 40, end="\r", file=sys.stderr)
    return planner, rows


def cheapest(rows: list[Row], gpus: int) -> Row | None:
    """The first row that fits; `settings_of` lists the cheapest setting first."""
    return next((row for row in rows if row.fits and not is_useless(row.setting, gpus)), None)


def table(rows: list[Row], own: Setting) -> str:
    """A table of training modes × DeepSpeed layouts: GB on each GPU, ✓ where it fits."""
    layouts = [
        layout for layout in dict.fromkeys([own.layout, *LAYOUTS]) if any(r.setting.layout == layout for r in rows)
    ]
    layouts.sort(key=lambda name: LAYOUTS.index(name) if name in LAYOUTS else -1)
    found = {row.setting: row for row in rows}
    divisor, unit = _unit(max(row.estimate.total for row in rows))
    lines = [f"{unit + ' on each GPU':<32}" + "".join(f"{name[-14:]:>15}" for name in layouts)]
    for mode in modes_of(own.mode):
        for checkpointing in (False, True):
            cells = [found.get(Setting(mode, layout, checkpointing)) for layout in layouts]
            if any(cells):
                name = f"{mode}, gradient checkpointing" if checkpointing else mode
                lines.append(f"{name:<32}" + "".join(f"{_cell(row, divisor):>15}" for row in cells))
    return "\n".join(lines)


def _unit(largest: int) -> tuple[float, str]:
    """The divisor from bytes and its unit; MB for small models, which need less than 0.1 GB."""
    return (1e9, "GB") if largest >= 1e8 else (1e6, "MB")


def _cell(row: Row | None, divisor: float) -> str:
    return "–" if row is None else f"{row.estimate.total / divisor:.1f}{' ✓' if row.fits else '  '}"


def _amount(amount: int) -> str:
    divisor, unit = _unit(abs(amount))
    return f"{amount / divisor:>8.2f} {unit}"


def formula(row: Row) -> str:
    """Formats one setting: each part with the numbers it is computed from, and their sum."""
    found = row.estimate
    checkpointing = ", gradient checkpointing" if row.setting.checkpointing else ""
    lines = [f"{row.setting.mode}, {row.setting.layout}{checkpointing}:"]
    for part in PARTS:
        lines.append(f"  {part:<12} {_amount(getattr(found, part))} = {found.words.get(part, '')}")
    if found.overlap:
        lines.append(f"  {'overlap':<12} {_amount(-found.overlap)} = freed before all gradients are allocated")
    lines.append(f"  {'total':<12} {_amount(found.total)} on each GPU")
    if found.host:
        lines.append(f"  {'CPU memory':<12} {_amount(found.host)} for each GPU")
    return "\n".join(lines)


def advice(rows: list[Row], gpu_memory: float | None, command: str | None) -> str:
    """The last lines of the report: the command of the cheapest setting that fits, or what to change."""
    if command:
        return f"cheapest that fits {gpu_memory:g} GB, {RESERVE / 1e9:g} GB of it reserved for CUDA:\n  {command}"
    if gpu_memory is None:
        return "give --gpu_memory, the GB of one GPU, to see what fits and the command for it"
    least = min(rows, key=lambda row: row.estimate.total)
    return (
        f"nothing fits {gpu_memory:g} GB; the least is {least.estimate.total / 1e9:.1f} GB. Lower --max_len "
        "or --per_device_train_batch_size, or take more GPUs"
    )


def as_json(rows: list[Row], own: Setting, best: Row | None) -> dict:
    """Every setting with its memory in bytes, the given setting, and the cheapest one that fits."""
    settings = [
        {**asdict(row.setting), **asdict(row.estimate), "total": row.estimate.total, "fits": row.fits} for row in rows
    ]
    cheapest_fit = asdict(best.setting) if best else None
    return {"reserve": RESERVE, "settings": settings, "own": asdict(own), "cheapest": cheapest_fit}
