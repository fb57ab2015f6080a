"""Evaluation metrics in which each trained token counts once."""

import functools
import math

from utils.data.row_type import RowType
from utils.runtime.distributed import all_gather_objects
from utils.template.tokenize import IGNORE_INDEX
from utils.train.figures import WeightedFiguresMixin, gather_counted, gather_with
from utils.train.token_losses import weigh, without_token_columns


class TokenWeightedEvalMixin(WeightedFiguresMixin):
    """A mix-in for TRL's SFTTrainer: no metric depends on how rows are divided into batches.

    transformers 5.23 averages the losses of batches, TRL 1.16 their accuracies, and with several processes both count
    rows twice that fill up the last step. Here, over all trained tokens t of the set,

        eval_loss           = Σ_t -w_t log p(t) / number of tokens, with the weights of the rows' answers, else w = 1
        eval_perplexity     = exp(Σ_t -log p(t) / number of tokens)
        eval_token_accuracy = tokens that have the highest probability / number of tokens
        eval_entropy        = Σ_t H(p) / number of tokens

    TRL's head computes the logits in chunks, so they are never in memory all at once. The loss is the plain
    cross-entropy, also if training adds label smoothing or a router's auxiliary loss.
    """

    _sums: list[float] = []

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        self._sums = [0.0] * 5
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        # summed in the same order on every process, so that all of them choose the same best step
        *sums, tokens = map(sum, zip(*all_gather_objects([self._sums]), strict=True))
        loss, plain_loss, right, entropy = (figure / tokens if tokens else math.nan for figure in sums)
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics[f"{metric_key_prefix}_perplexity"] = perplexity(plain_loss)
        output.metrics[f"{metric_key_prefix}_token_accuracy"] = right
        output.metrics[f"{metric_key_prefix}_entropy"] = entropy
        return output

    def compute_loss(self, model, inputs, *args, **kwargs):
        tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        counts = self.accelerator.gather(tokens).reshape(-1).tolist()  # 0 if a batch only fills up a step
        gather = functools.partial(gather_counted, self.accelerator.gather, counts)
        with gather_with(self.accelerator, gather):
            result = super().compute_loss(model, inputs, *args, **kwargs)
        self.weigh_figures({name: sum(counts) for name in ("entropy", "mean_token_accuracy")})
        return result

    def add_token_losses(self, output, inputs: dict, plain) -> None:
        """Called with TRL's output for each batch that is evaluated (utils/train/row_losses.py).

        Args:
            output: its `log_probs` are weighted.
            inputs: of the model.
            plain: the log-probabilities without weights.
        """

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        import torch

        inputs = self._prepare_inputs({name: value for name, value in inputs.items() if name != "source"})
        inputs, columns = without_token_columns(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs, use_cache=False, fused_lm_head=True)
        plain = output.log_probs
        weigh(output, columns)
        self.add_token_losses(output, inputs, plain)
        # [rows, length - 1] each, 0 where nothing is trained
        parts = (-output.log_probs, -plain, output.is_top1, output.entropy, output.label_mask)
        sums = torch.stack([part.float().sum() for part in parts]).tolist()
        self._sums = [total + part for total, part in zip(self._sums, sums, strict=True)]
        return None, None, None


def perplexity(loss: float) -> float:
    """exp(loss), or infinity if that overflows float64."""
    return math.exp(loss) if not loss > 709 else math.inf


def fill_up(rows, train_args, row_type: RowType):
    """Adds rows of one unlabelled token, so that every process evaluates equally many batches and no row twice.

    accelerate 1.15 would repeat the first rows, and with `--dataloader_drop_last` transformers drops the last ones.

    Args:
        rows: the validation rows, a dataset, or None.
        train_args: the recipe's TrainArgument.
        row_type: of the rows.
    """
    step = train_args.eval_batch_size * train_args.world_size
    if rows is None or not len(rows) % step or not (train_args.world_size > 1 or train_args.dataloader_drop_last):
        return rows
    from datasets import Dataset, concatenate_datasets

    filler = row_type.filler(rows[0])
    missing = -len(rows) % step
    return concatenate_datasets([rows, Dataset.from_list([filler] * missing, features=rows.features)])
