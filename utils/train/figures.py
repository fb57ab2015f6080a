"""Figures of the log as means over rows or tokens, however these are divided into batches."""


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
            *before, newest = figures[name]  # at most one before; none after a line of the log
            total = totals.get((mode, name), 0) if before else 0
            totals[mode, name] = total + count
            if total + count == 0:
                continue
            # a batch without any has no mean, and may hold NaN in its place
            sums = ([total * before[0]] if total else []) + ([count * newest] if count else [])
            figures[name] = [sum(sums) / (total + count)]
