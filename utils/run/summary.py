"""The summary of a finished run, for its record and for the terminal."""

import math
import shlex
from pathlib import Path

from loguru import logger

from utils.data.mixture import Mixture, format_mixture
from utils.runtime.distributed import world_size
from utils.train.plan import rows_of_epochs
from utils.train.row_ledger import format_counts


def summarise(trainer, args, data, folder: Path) -> dict:
    """The summary of a run: folder, rows, steps, losses, best step, and the next command."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {
        "folder": str(folder),
        "rows_trained": data.rows_trained(),
        "rows_dropped": data.report.dropped_rows(),
        "answers": data.report.answers,
        "answers_untrained": data.report.untrained,
        "answers_not_chosen": data.report.not_chosen,
        "steps": trainer.state.global_step,
        "steps_skipped": trainer.steps_skipped,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        **evaluation_summary(trainer),
        "gpu_memory": _gpu_memory(trainer),
        **_ledger_counts(trainer),
        **_mixture(trainer, data),
        "next": f"python -m utils.script.infer --model_path {shlex.quote(str(folder))}",
    }


def _ledger_counts(trainer) -> dict:
    """The counts of the row ledger, if the run has one."""
    ledger = getattr(trainer, "ledger", None)
    return {"row_ledger": ledger.counts()} if ledger is not None else {}


def _mixture(trainer, data) -> dict:
    """What was drawn of each source of a mixture."""
    if not isinstance(data.order, Mixture):
        return {}
    rows = rows_of_epochs(trainer.args, len(data.order), world_size(), trainer.state.global_step)
    return {"mixture": data.order.table(data.order.count_drawn(rows))}


def _mixture_lines(summary: dict) -> str:
    return "".join(f"  drawn of         {line}\n" for line in format_mixture(summary.get("mixture", [])))


def _gpu_memory(trainer) -> int | None:
    """Peak memory of this process's GPU in bytes; None on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() if trainer.args.device.type == "cuda" else None


def print_summary(summary: dict) -> None:
    """Prints the summary, on the first process only."""
    if not summary:
        return

    def loss(value):
        return "not measured" if value is None else f"{value:.4f}"

    skipped = (
        f", {summary['steps_skipped']:,} of them skipped (loss or gradients not finite)"
        if summary["steps_skipped"]
        else ""
    )
    untrained = ""
    if summary["answers_untrained"]:
        untrained = "; {answers_untrained:,} of their {answers:,} answers are not trained".format(**summary)
    if summary["answers_not_chosen"]:
        untrained += "; {answers_not_chosen:,} of {answers:,} answers are left out by --train_on".format(**summary)
    logger.info(
        "\nfinished: {folder}\n"
        "  training rows    {rows_trained:,}, dropped {rows_dropped:,}{untrained}\n"
        "  steps            {steps:,}{skipped}\n"
        "  loss             {first} at first, {last} at last\n"
        "{mixed}{evaluation}{ledger}"
        "talk to it:\n  {next}",
        first=loss(summary["first_loss"]),
        last=loss(summary["last_loss"]),
        evaluation=evaluation_lines(summary),
        ledger=_ledger_line(summary),
        mixed=_mixture_lines(summary),
        skipped=skipped,
        untrained=untrained,
        **summary,
    )


def _ledger_line(summary: dict) -> str:
    if "row_ledger" not in summary:
        return ""
    command = f"python -m utils.script.ledger {shlex.quote(summary['folder'])}"
    return f"  row ledger       {format_counts(summary['row_ledger'])}; see them: {command}\n"


def evaluation_summary(trainer) -> dict:
    """The evaluation of the weights a run saves, and its best step.

    Returns:
        `first_eval_step` and `first_eval_loss`; `eval_step` and `eval_…` of the saved weights, which are those of the
        last step unless the best is kept; `eval_accuracy` is that of preference pairs; `best_step`, and `best_figure`
        by which it was chosen; `best_kept`: whether its weights are saved. Each is None if there is none.
    """
    args, state = trainer.args, trainer.state
    entries = {entry["step"]: entry for entry in state.log_history if "eval_loss" in entry}
    figure = args.metric_for_best_model or "eval_loss"
    finite = {step: entry[figure] for step, entry in entries.items() if math.isfinite(entry.get(figure, math.nan))}
    pick = max if args.greater_is_better else min
    best, kept = pick(finite, key=finite.__getitem__, default=None), False
    if args.load_best_model_at_end and state.best_model_checkpoint:
        best, kept = state.best_global_step, True
    step = best if kept else max(entries, default=None)
    first = min(entries, default=None)
    entry = entries.get(step, {})
    return {
        "first_eval_step": first,
        "first_eval_loss": entries[first]["eval_loss"] if entries else None,
        "eval_step": step,
        "eval_loss": entry.get("eval_loss"),
        "eval_perplexity": entry.get("eval_perplexity"),
        "eval_token_accuracy": entry.get("eval_token_accuracy"),
        "eval_accuracy": entry.get("eval_rewards/accuracies"),
        "best_step": best,
        "best_figure": figure if best is not None else None,
        "best_kept": kept if best is not None else None,
    }


def evaluation_lines(summary: dict) -> str:
    """Formats `evaluation_summary` as lines of the printed summary."""
    if summary["eval_loss"] is None:
        return "  evaluation loss  not measured\n"
    text = f"  evaluation loss  {summary['eval_loss']:.4f}"
    if summary["first_eval_step"] != summary["eval_step"]:
        # losses of single steps are of other rows each, so they do not show whether a model has learned
        text += f" ({summary['first_eval_loss']:.4f} at step {summary['first_eval_step']:,})"
    if summary["eval_perplexity"] is not None:
        share = 100 * summary["eval_token_accuracy"]
        text += f", perplexity {summary['eval_perplexity']:.4g}, {share:.1f} % of the tokens right"
    if summary["eval_accuracy"] is not None:
        share = 100 * summary["eval_accuracy"]
        text += f"\n  evaluation pairs {share:.0f} % with the higher reward for chosen"
    if summary["best_step"] is None:
        return text + "\n"
    which = "that step" if summary["best_kept"] else "the last step; --load_best_model_at_end true keeps the best"
    return f"{text}\n  best step        {summary['best_step']:,} by {summary['best_figure']}, saved is {which}\n"
