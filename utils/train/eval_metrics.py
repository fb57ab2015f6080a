"""Figures of a validation set, in which each trained token counts once."""

import math

from utils.runtime.distributed import all_gather_objects
from utils.train.filler import empty_row


class CountsTokens:
    """A mix-in for TRL's SFTTrainer, whose figures then do not depend on how rows are cut into batches.

    transformers takes the mean of the batches' losses, TRL the mean of their accuracies, and with several
    processes both count rows twice that fill the last step up. Here, over all trained tokens t of the set,

        eval_loss           = Σ_t -log p(t) / number of tokens
        eval_perplexity     = exp(eval_loss)
        eval_token_accuracy = tokens that are the most likely one / number of tokens
        eval_entropy        = Σ_t H(p) / number of tokens

    p is never there as a whole: TRL's head goes over the vocabulary in chunks. The loss is the plain
    cross-entropy, also where label smoothing or a router's balance is trained.
    """

    _sums: list[float] = []

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        self._sums = [0.0] * 4
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        # in the same order in every process, so that all of them find the same best step
        loss, right, entropy, tokens = map(sum, zip(*all_gather_objects([self._sums]), strict=True))
        figures = [figure / tokens if tokens else math.nan for figure in (loss, right, entropy)]
        output.metrics[f"{metric_key_prefix}_loss"] = figures[0]
        output.metrics[f"{metric_key_prefix}_perplexity"] = perplexity(figures[0])
        output.metrics[f"{metric_key_prefix}_token_accuracy"] = figures[1]
        output.metrics[f"{metric_key_prefix}_entropy"] = figures[2]
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        import torch

        inputs = self._prepare_inputs({name: value for name, value in inputs.items() if name != "source"})
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs, use_cache=False, fused_lm_head=True)
        # [rows, length - 1] each, 0 where nothing is trained
        parts = (-output.log_probs, output.is_top1, output.entropy, output.label_mask)
        sums = torch.stack([part.float().sum() for part in parts]).tolist()
        self._sums = [total + part for total, part in zip(self._sums, sums, strict=True)]
        return None, None, None


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is no number of 64 bits."""
    return math.exp(loss) if not loss > 709 else math.inf


def fill_up(rows, train_args):
    """Adds rows of one token without a label, so that every process has equally many batches of different rows.

    accelerate would give the first rows a second time, and `--dataloader_drop_last` would leave the last ones out.

    Args:
        rows: the validation rows, a dataset, or None.
        train_args: the recipe's TrainArgument.
    """
    step = train_args.eval_batch_size * train_args.world_size
    if rows is None or not len(rows) % step or not (train_args.world_size > 1 or train_args.dataloader_drop_last):
        return rows
    from datasets import Dataset, concatenate_datasets

    one = empty_row(rows.column_names)
    missing = -len(rows) % step
    return concatenate_datasets([rows, Dataset.from_list([one] * missing, features=rows.features)])


def evaluation_summary(trainer) -> dict:
    """The figures of the weights a run saves, and which step was the best.

    Returns:
        `eval_step` with `eval_…` of the saved weights (of the last evaluation where the best is not kept),
        `eval_accuracy` being that of preference pairs; `best_step`, `best_figure` by which it was chosen;
        `best_kept`: whether the weights are those of that step. Each None where there is none.
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
    told = entries.get(step, {})
    return {
        "eval_step": step,
        "eval_loss": told.get("eval_loss"),
        "eval_perplexity": told.get("eval_perplexity"),
        "eval_token_accuracy": told.get("eval_token_accuracy"),
        "eval_accuracy": told.get("eval_rewards/accuracies"),
        "best_step": best,
        "best_figure": figure if best is not None else None,
        "best_kept": kept if best is not None else None,
    }


def evaluation_lines(summary: dict) -> str:
    """The same figures as lines of the summary that a run prints."""
    if summary["eval_loss"] is None:
        return "  evaluation loss  not measured\n"
    told = f"  evaluation loss  {summary['eval_loss']:.4f}"
    if summary["eval_perplexity"] is not None:
        share = 100 * summary["eval_token_accuracy"]
        told += f", perplexity {summary['eval_perplexity']:.4g}, {share:.1f} % of the tokens right"
    if summary["eval_accuracy"] is not None:
        share = 100 * summary["eval_accuracy"]
        told += f"\n  evaluation pairs {share:.0f} % with the higher reward for chosen"
    if summary["best_step"] is None:
        return told + "\n"
    which = "that step" if summary["best_kept"] else "the last step; --load_best_model_at_end true keeps the best"
    return f"{told}\n  best step        {summary['best_step']:,} by {summary['best_figure']}, saved is {which}\n"
