"""Figures of the log as means over rows or tokens, however these are divided into batches and processes."""

from unittest.mock import patch


class WeightedFiguresMixin:
    """A mix-in for TRL's trainers, which log the mean of the batches' means.

    There a short batch counts as much as a long one, so that figures depend on `--gradient_accumulation_steps`. Here,
    over the batches b since the last line of the log, each with a mean m_b over n_b rows or tokens,

        figure = Σ_b n_b · m_b / Σ_b n_b
    """

    def weigh_figures(self, counts: dict[str, int]) -> None:
        """Merges the newest value of each figure with those of earlier batches.

        Args:
            counts: figure → how many rows or tokens its newest value is the mean of, on all processes.
        """
        mode = "train" if self.model.training else "eval"
        figures, totals = self._metrics[mode], self.__dict__.setdefault("_figure_totals", {})
        for name, count in counts.items():
            *before, newest = figures[name]  # none before after a line of the log
            total = totals.get((mode, name), 0) if before else 0
            totals[mode, name] = total + count
            # a batch without any has no mean, and may hold NaN in its place
            sums = ([total * before[0]] if total else []) + ([count * newest] if count else [])
            figures[name] = [sum(sums) / (total + count) if total + count else newest]


def gather_with(accelerator, gather):
    """A context in which an accelerator gathers the metrics of a batch with another function.

    accelerate 1.15 (`gather_for_metrics`) would cut what is gathered in an epoch's last update to the number of rows
    beyond the last full step. That is for tensors with a value of each row, but TRL 1.16 gathers one of each process.

    Args:
        accelerator: accelerate's Accelerator.
        gather: a tensor of this process → that of all processes.
    """
    return patch.multiple(accelerator, gather=gather, gather_for_metrics=gather)


def gather_counted(gather, counts: list[int], value):
    """As accelerate's `gather` of one number, without the processes whose batch only fills up a step.

    Args:
        gather: accelerate's.
        counts: how many rows or tokens of each process count, [processes].
        value: of this process, a tensor of any shape; only a number is filtered.

    Returns:
        [processes that have any], or all of them if none has
    """
    import torch

    gathered = gather(value)
    if value.ndim or all(counts) or not any(counts):
        return gathered
    return gathered[torch.tensor(counts, device=gathered.device) > 0]
