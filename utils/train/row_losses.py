"""The losses of rows: summed by source for the log, and noted in the row ledger."""

from pathlib import Path

import numpy as np
from loguru import logger

from utils.data.places import decode_sources
from utils.runtime.distributed import all_gather_objects
from utils.storage.run_files import LEDGER_FILE
from utils.train.row_ledger import RowLedger
from utils.train.token_losses import sequence_index

_MOST_STEPS = 100  # after so many steps the losses are moved to the host, also if nothing is logged


class PendingLosses:
    """Losses of sequences that stay on their device, so that no step waits for them."""

    def __init__(self):
        self._batches: list[tuple] = []

    def add(self, sources: list[int], step: int, figures) -> None:
        """Adds a batch.

        Args:
            sources: of its sequences, [N].
            step: the step that it is part of.
            figures: a tensor, [figures, N].
        """
        self._batches.append((sources, step, figures))

    def take(self) -> tuple:
        """Moves all losses to the host and merges those of all processes; every process must call it.

        Returns:
            sources [N], steps [N] and figures [figures, N] as NumPy arrays; None on each process if there are none.
        """
        batches, self._batches = self._batches, []
        parts = []
        if batches:
            import torch

            sources = np.array([source for sources, _, _ in batches for source in sources], "int64")
            steps = np.repeat([step for _, step, _ in batches], [len(sources) for sources, _, _ in batches])
            parts = [(sources, steps, torch.cat([figures for _, _, figures in batches], dim=1).cpu().numpy())]
        parts = all_gather_objects(parts)
        return tuple(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)) if parts else (None,) * 3


class RowLossesMixin:
    """A mix-in for TRL's trainers: losses by source in the log, and the row ledger.

    For each source s, over its labelled tokens t since the last line of the log, or of the whole evaluation,

        loss/s       = Σ_t -w_t log p(t) / tokens/s       w_t: the weight of the token's message, 1 by default
        tokens/s     = their number

    so that Σ_s tokens/s · loss/s is the sum of all tokens' losses; of preference pairs, read pair for token
    (`pairs/s`). They are logged if there are at least two sources. The ledger's losses are without weights.

    Attributes:
        source_names: the name of each training file's source; `eval_source_names` of each evaluation file's.
        ledger: the row ledger, or None.
        loss_unit: what a loss is the mean over, `tokens` or `pairs`.
    """

    source_names: tuple[str, ...] = ()
    eval_source_names: tuple[str, ...] = ()
    ledger: RowLedger | None = None
    loss_unit = "tokens"
    _taken_at = 0  # the step up to which the losses were moved to the host

    def training_step(self, *args, **kwargs):
        if self.state.global_step - self._taken_at >= _MOST_STEPS:
            self._take_training()
        return super().training_step(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        self.batch_sources = inputs.get("source", [])
        return super().prediction_step(model, inputs, *args, **kwargs)

    def observe_tokens(self, output, inputs: dict, columns: dict) -> None:
        plain = output.log_probs
        super().observe_tokens(output, inputs, columns)
        self.add_token_losses(output, inputs, plain)

    def add_token_losses(self, output, inputs: dict, plain) -> None:
        """Sums the losses of a batch's tokens by sequence.

        Args:
            output: TRL's FusedCausalLMOutput, whose `log_probs` are weighted.
            inputs: of the model.
            plain: the log-probabilities without weights.
        """
        if not self._collects():
            return
        import torch

        log_probs, plain = output.log_probs.detach(), plain.detach()
        if self.model.training and self.args.loss_type == "dft":  # TRL's loss is -p log p (arXiv 2508.05629)
            log_probs = log_probs * log_probs.exp()
        parts = torch.stack([part.float().flatten() for part in (-log_probs, -plain, output.label_mask)])
        sequence = sequence_index(inputs)[:, 1:].flatten()
        self._add(parts.new_zeros(len(parts), len(self.batch_sources)).index_add_(1, sequence, parts))

    def add_pair_losses(self, losses) -> None:
        """Notes the losses of a batch's preference pairs, [pairs]."""
        if self._collects():
            import torch

            losses = losses.detach().float()
            self._add(torch.stack([losses, losses, torch.ones_like(losses)]))

    def _collects(self) -> bool:
        """Whether the losses of the batch at hand are used; those of one that only fills up a step are not."""
        return self._uses_losses(self.model.training) and bool(self.batch_sources)

    def _uses_losses(self, training: bool) -> bool:
        """Whether losses of rows are used, in the training or in an evaluation; the same on every process."""
        names = self.source_names if training else self.eval_source_names
        return len(set(names)) > 1 or (training and self.ledger is not None)

    def _pending(self, training: bool) -> PendingLosses:
        return self.__dict__.setdefault("_pending_losses", {}).setdefault(training, PendingLosses())

    def _add(self, figures) -> None:
        self._pending(self.model.training).add(self.batch_sources, self.state.global_step + 1, figures)

    def _take_training(self) -> None:
        """Adds the losses since the last call to the sums of the sources and to the ledger, on every process."""
        self._taken_at = self.state.global_step
        if not self._uses_losses(training=True):
            return
        sources, steps, figures = self._pending(True).take()
        if self.ledger is not None and self.args.should_save:
            self.ledger.note.step = self.state.global_step
            if sources is not None:
                self.ledger.add(sources, steps, *figures[1:].astype("float64"))
        if sources is not None and len(set(self.source_names)) > 1:
            sums = self.__dict__.setdefault("_source_sums", {})
            for name, values in sum_by_source(sources, figures, self.source_names).items():
                sums[name] = sums.get(name, 0) + values

    def log(self, logs: dict, start_time=None) -> None:
        if "loss" in logs:  # the training's, since the last line of the log
            self._take_training()
            logs |= source_figures(self.__dict__.pop("_source_sums", {}), "", self.loss_unit)
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sources, _, figures = self._pending(False).take() if self._uses_losses(training=False) else (None,) * 3
        if sources is not None:
            sums = sum_by_source(sources, figures, self.eval_source_names)
            output.metrics.update(source_figures(sums, f"{metric_key_prefix}_", self.loss_unit))
        return output

    # ------------------------------------------------------------------ the ledger's file
    def _init_training_state(self, *args, **kwargs):
        found = super()._init_training_state(*args, **kwargs)
        self._pending_losses, self._source_sums, self._taken_at = {}, {}, self.state.global_step
        if self.ledger is not None:
            self._resume_ledger()
        return found

    def _resume_ledger(self) -> None:
        """Continues the checkpoint's ledger; without one of the same files, the ledger begins here."""
        note, step = self.ledger.note, self.state.global_step
        self.ledger.clear()
        note.step = note.first_step = step
        if not step:
            return
        checkpoint = Path(self.args.resume_from_checkpoint)
        try:
            earlier = RowLedger.read(checkpoint / LEDGER_FILE)
        except (OSError, ValueError):
            logger.warning("{} has no {}: the row ledger begins after step {}", checkpoint, LEDGER_FILE, step)
            return
        if earlier.note.sha256 != note.sha256:  # the same rows may be in other files, whose lines are others
            logger.warning(
                "the training files were changed, joined or split since {}: the row ledger begins after step {}",
                checkpoint,
                step,
            )
            return
        self.ledger.rows, note.first_step = earlier.rows, earlier.note.first_step

    def _save_checkpoint(self, *args, **kwargs):
        if self.ledger is not None:
            self._take_training()
        super()._save_checkpoint(*args, **kwargs)

    def complete_checkpoint(self, folder: Path) -> None:
        if self.ledger is not None:
            for place in (folder, folder.parent):
                self.ledger.write(place / LEDGER_FILE)
        super().complete_checkpoint(folder)

    def save_state(self):
        super().save_state()
        if self.ledger is not None:
            self._take_training()
            if self.args.should_save:
                self.ledger.write(Path(self.args.output_dir) / LEDGER_FILE)


def sum_by_source(sources, figures, names: tuple[str, ...]) -> dict:
    """Sums the losses and counts of sequences by source.

    Args:
        sources: of the sequences, as from `encode_source`, [N].
        figures: sums of losses with and without weights, and counts, [3, N]. Losses that are not finite are left out.
        names: the source of each file.

    Returns:
        name → array of (sum of the losses with weights, count), in the order of the files.
    """
    file, _ = decode_sources(sources)
    used = np.isfinite(figures[0])
    sums = [np.bincount(file[used], row[used].astype("float64"), len(names)) for row in (figures[0], figures[2])]
    found: dict = {}
    for name, *values in zip(names, *sums, strict=True):
        found[name] = found.get(name, 0) + np.array(values)
    return found


def source_figures(sums: dict, prefix: str, unit: str) -> dict[str, float]:
    """The figures of the log: `{"eval_loss/maths": 1.5, "eval_tokens/maths": 120}`; none of a source without tokens.

    Args:
        sums: from `sum_by_source`.
        prefix: before each name, such as `eval_`.
        unit: what is counted, `tokens` or `pairs`.
    """
    found = {}
    for name, (loss, count) in sums.items():
        if count:
            found[f"{prefix}loss/{name}"] = float(loss / count)
            found[f"{prefix}{unit}/{name}"] = int(count)
    return found
