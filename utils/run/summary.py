"""The figures a run ends with, for its folder and for the terminal."""

import shlex
from pathlib import Path

from loguru import logger

from utils.train.eval_metrics import evaluation_lines, evaluation_summary


def summarise(trainer, args, data, folder: Path) -> dict:
    """The figures a run ends with."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {
        "folder": str(folder),
        "rows_trained": data.rows_trained(),
        "rows_dropped": data.report.dropped_rows(),
        "answers_untrained": data.report.untrained,
        "steps": trainer.state.global_step,
        "steps_skipped": trainer.steps_skipped,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        **evaluation_summary(trainer),
        "gpu_memory": _gpu_memory(trainer),
        "next": f"python -m utils.script.infer --model_path {shlex.quote(str(folder))}",
    }


def _gpu_memory(trainer) -> int | None:
    """The most bytes that were in use on this process's GPU."""
    import torch

    return torch.cuda.max_memory_allocated() if trainer.args.device.type == "cuda" else None


def print_summary(summary: dict) -> None:
    """Prints the summary, on the first process only."""
    if not summary:
        return

    def figure(value):
        return "not measured" if value is None else f"{value:.4f}"

    skipped = f", {summary['steps_skipped']:,} of them left out (--on_nan skip)" if summary["steps_skipped"] else ""
    untrained = f"; {summary['answers_untrained']:,} of their answers are not" if summary["answers_untrained"] else ""
    logger.info(
        "\nfinished: {folder}\n"
        "  rows trained     {rows_trained:,}, dropped {rows_dropped:,}{untrained}\n"
        "  steps            {steps:,}{skipped}\n"
        "  loss             {first} at first, {last} at last\n"
        "{evaluation}"
        "talk to it:\n  {next}",
        first=figure(summary["first_loss"]),
        last=figure(summary["last_loss"]),
        evaluation=evaluation_lines(summary),
        skipped=skipped,
        untrained=untrained,
        **summary,
    )
