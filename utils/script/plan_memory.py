"""Plans the memory of a training run on each GPU, from the model's config.json alone: no weights, no GPU.

python -m utils.script.plan_memory --model_name_or_path Qwen/Qwen1.5-7B --gpus 2 --gpu_memory 24
python -m utils.script.plan_memory --train_mode qlora --max_len 2048 --json true   # and any flag of main_train.py
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Literal

from utils.args import parse_args
from utils.config.deepspeed import ALLOWED, NAMES
from utils.config.flags import arg, flag_of, make_parser, read_flags, split_flags, split_own, value_of
from utils.memory.planner import batch_of
from utils.memory.report import advice, as_json, cheapest, formula, make_plan, table
from utils.memory.search import command_of
from utils.model.source import given_model
from utils.runtime.command import run_command
from utils.runtime.errors import UserError, nearest, raise_if_any
from utils.runtime.log import setup_logging
from utils.storage.files import project_path

# flags of main_train.py that do not change the memory, and whose paths need not exist on this machine
_NOT_NEEDED = ("train_data_path", "eval_data_path", "val_size", "streaming", "shuffle_buffer", "output_dir",
               "mixing_strategy", "mixing_unit", "mixing_stop", "curriculum",
               "cache_dir", "resume_from_checkpoint",
               "report_to", "overwrite_output_dir", "push_to_hub", "hub_model_id")  # fmt: skip


@dataclass
class PlanArgs:
    """Flags of this command; all others are main_train.py's."""

    gpus: int = arg(1, "The number of GPUs that train together, 1 to 8.")
    gpu_memory: float | None = arg(
        None,
        "Memory of each GPU in GB, to mark the settings that fit. Default: that of this machine's GPU, if it has one.",
    )
    tokens_per_row: int | None = arg(
        None, "Tokens in each row of a step. Default: --max_len, the longest possible row."
    )
    trained_share: float = arg(1.0, "Share of the tokens that have a label. Default: all of them, the worst case.")
    logits: Literal["tiles", "whole"] = arg(
        "tiles", "tiles: logits in chunks, as main_train.py computes them. whole: all logits at once in float32."
    )
    json: bool = arg(False, "Print JSON, in bytes.")


def _split(argv: list[str]) -> tuple[list[str], list[str], dict]:
    """Splits the flags into this command's, main_train.py's, and those of main_train.py that are resolved here."""
    mine, rest = split_own(argv, PlanArgs)
    theirs, resolved = [], {}
    for group in split_flags(rest):
        flag = flag_of(group)
        value = value_of(group, flag)
        if flag in _NOT_NEEDED:
            continue
        elif flag == "deepspeed" or (flag == "precision" and value in ("auto", "bf16", "fp16", "fp32")):
            resolved[flag] = value
        elif flag == "attn_implementation" and value == "flash_attention_2":
            continue  # keeps the same activations as PyTorch's attention
        else:
            theirs += group
    return mine, theirs, resolved


def _check(plan: PlanArgs, resolved: dict) -> list[str]:
    problems = []
    if not 1 <= plan.gpus <= 8:
        problems.append(f"--gpus {plan.gpus} is not allowed; give a whole number from 1 to 8")
    if plan.gpu_memory is not None and not 0 < plan.gpu_memory < 10_000:
        problems.append(f"--gpu_memory {plan.gpu_memory:g} is not allowed; give the GB of one GPU, 24 for example")
    if plan.tokens_per_row is not None and plan.tokens_per_row < 2:
        problems.append(f"--tokens_per_row {plan.tokens_per_row} is not allowed; give a whole number of at least 2")
    if not 0 < plan.trained_share <= 1:
        problems.append(f"--trained_share {plan.trained_share:g} is not allowed; give more than 0 and at most 1")
    layout = resolved.get("deepspeed", "none")
    if layout not in ("none", *NAMES) and not layout.endswith(".json"):
        problems.append(f"--deepspeed {layout!r} cannot be planned.{nearest(layout, NAMES)} Allowed: a file, {ALLOWED}")
    return problems


def read(argv: list[str]):
    """Reads the flags.

    Returns:
        (PlanArgs, CommonArgs, TrainArgument, main_train.py's flags as they were given)

    Raises:
        UserError: with every problem at once.
    """
    mine, theirs, resolved = _split(argv)
    values, _, problems = read_flags(make_parser([PlanArgs], "utils.script.plan_memory", __doc__), mine)
    plan = PlanArgs(**values)
    problems += _check(plan, resolved)
    try:
        args, train_args = parse_args(theirs, needs_weights=False)
    except UserError as error:
        raise UserError(*problems, *error.problems) from error
    raise_if_any(problems)
    _set_precision_and_layout(args, train_args, resolved, set(map(flag_of, split_flags(theirs))))
    if plan.tokens_per_row is not None:
        args.max_len = plan.tokens_per_row
    if plan.gpu_memory is None:
        plan.gpu_memory = _gpu_memory()
    return plan, args, train_args, split_own(argv, PlanArgs)[1]


def _set_precision_and_layout(args, train_args, resolved: dict, given: set[str]) -> None:
    """Sets precision and DeepSpeed layout for the planned GPUs, even if this machine supports neither."""
    precision = resolved.get("precision", "auto")
    if precision != "auto":
        args.precision = precision
    elif not given & {"bf16", "fp16", "config"}:
        args.precision = "bf16"
    layout = resolved.get("deepspeed")
    if layout is not None:
        file = project_path(layout) if layout.endswith(".json") else layout
        train_args.deepspeed = None if layout == "none" else file


def _gpu_memory() -> float | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else None


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    plan, args, train_args, given = read(list(sys.argv[1:] if argv is None else argv))
    batch = replace(batch_of(args, train_args, whole_logits=plan.logits == "whole"), trained=plan.trained_share)
    planner, rows = make_plan(args, train_args, plan.gpus, plan.gpu_memory, batch)
    own, best = planner.own(), cheapest(rows, plan.gpus)
    command = command_of(best.setting, own, given, plan.gpus) if best else None
    if plan.json:
        found = {"model": given_model(args.model_name_or_path), "weights": planner.weights, "gpus": plan.gpus,
                 "gpu_memory": plan.gpu_memory, "precision": args.precision, "batch": asdict(batch)}  # fmt: skip
        found |= as_json(rows, own, best) | {"command": command}
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    where = "one GPU" if plan.gpus == 1 else f"each of {plan.gpus} GPUs"
    weights = f"{planner.weights:,} weights, {args.precision}"
    print(f"{given_model(args.model_name_or_path)}: {weights}, {planner.batch} a step on {where}\n")
    print(table(rows, own) + "\n")
    print(formula(best or next((row for row in rows if row.setting == own), rows[0])) + "\n")
    print(advice(rows, plan.gpu_memory, command))


if __name__ == "__main__":
    run_command(main)
