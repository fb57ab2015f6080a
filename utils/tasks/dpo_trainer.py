"""Builds TRL's DPOTrainer on prepared pairs, with the right reference model."""

import functools
from pathlib import Path

import pyarrow
import torch

from utils.data.prepare import Data
from utils.model.adapter import adapter_of
from utils.model.head import check_head
from utils.model.load import load_model
from utils.model.meta import whole_models
from utils.model.pissa import with_pissa
from utils.runtime.distributed import wait_for_everyone
from utils.tasks.trainer import make_trainer, needs_uniform_dtype
from utils.train.figures import WeightedFiguresMixin, gather_counted, gather_with
from utils.train.filler import FillLastStepMixin, fills_up
from utils.train.row_losses import RowLossesMixin
from utils.train.trainer import FaultTolerantTrainerMixin


class PreparedPairsMixin(RowLossesMixin, FillLastStepMixin, WeightedFiguresMixin, FaultTolerantTrainerMixin):
    """A mix-in for TRL's DPOTrainer: takes tokenized pairs, and weights each pair equally in its update.

    TRL 1.16 averages over the pairs of a micro-batch and transformers 5.23 over the micro-batches, so that the pairs of
    a smaller last one would count more. Here, in an update of N pairs on all processes, whose gradients DDP averages,

        loss of a micro-batch of n pairs = mean over its pairs · n · processes / N
    """

    loss_unit = "pairs"
    loss_is_scaled_for_ga = True  # tells transformers not to divide by the number of micro-batches
    _weight: float = 1.0
    _pairs: int | None = None  # of the current batch; None outside a step or an evaluation

    def get_eval_dataloader(self, eval_dataset=None):
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None or not fills_up(self.args, self.accelerator.num_processes):
            return super().get_eval_dataloader(eval_dataset)
        return self.filled_loader(rows, "Evaluation", self.args.eval_batch_size, self._get_eval_sampler)

    def _get_num_items_in_batch(self, batch_samples, device):
        pairs = torch.tensor([sum(map(count_pairs, batch_samples))], device=device)
        return self.accelerator.gather(pairs).sum()

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._pairs = count_pairs(inputs)
        self._weight = self._pairs * self.accelerator.num_processes / num_items_in_batch
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model, inputs, *args, **kwargs):
        self._pairs = count_pairs(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return result * self._weight if self.model.training and not return_outputs else result

    def _prepare_dataset(self, dataset, *_):
        return dataset  # TRL 1.16 would render and tokenize the rows

    def _precompute_ref_logps(self, *inputs):
        self.prepare_weights()  # TRL 1.16 calls this in its constructor, before `make_trainer` can
        with whole_models(self.args):
            check_head(self.model)
        if self.args.should_save:  # one process, as all of them read the same file
            _remove_incomplete_cache(Path(inputs[0].cache_files[0]["filename"]).parent)
        wait_for_everyone()
        return super()._precompute_ref_logps(*inputs)

    def _compute_loss(self, model, inputs, return_outputs):
        pairs = count_pairs(inputs) if self._pairs is None else self._pairs
        counts = self.accelerator.gather(torch.tensor([pairs], device=self.accelerator.device)).tolist()
        gather = self.accelerator.gather
        if len(set(counts)) > 1:
            gather = functools.partial(gather_uneven, gather, counts, _size(inputs))
        with gather_with(self.accelerator, gather):
            result = super()._compute_loss(model, inputs, return_outputs)
        self.weigh_figures(self._counts_of_figures(inputs, pairs, sum(counts)))
        self._pairs = None
        return result

    def _counts_of_figures(self, inputs, here: int, pairs: int) -> dict[str, int]:
        """How many pairs, or tokens of answers, each figure of a batch is the mean of.

        Args:
            inputs: the batch of this process.
            here: how many of its pairs count; none if it only fills up a step.
            pairs: the same, on all processes.
        """
        figures = self._metrics["train" if self.model.training else "eval"]
        counts = {name: pairs for name in figures if name.startswith(("rewards/", "logps/", "aux_loss"))}
        if "entropy" in figures:  # TRL's own loss; its collator's first half of the rows has the chosen answers
            chosen, rejected = (half.sum() for half in inputs["completion_mask"][:, 1:].chunk(2))
            tokens = torch.stack([chosen, rejected]) * (here > 0)
            tokens = self.accelerator.gather(tokens).view(-1, 2).sum(dim=0).tolist()
            counts |= {"entropy": sum(tokens), "mean_token_accuracy": tokens[0]}
            counts |= {"logits/chosen": tokens[0], "logits/rejected": tokens[1]}
        return counts

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != "source"})


def _remove_incomplete_cache(folder: Path) -> None:
    """Removes incomplete cache files of the reference's log-probabilities, on which TRL 1.16 would fail every time."""
    import datasets

    for file in folder.glob("cache-*.arrow"):
        try:
            datasets.Dataset.from_file(str(file))
        except pyarrow.ArrowInvalid:
            file.unlink(missing_ok=True)


def make_dpo_trainer(trainer_class: type, args, train_args, model, adapter, data: Data, collator, tokenizer):
    """Builds a DPOTrainer whose reference is the policy at its start.

    - with a new adapter: the same model with the adapter off
    - with a loaded adapter: a frozen copy of it, named `ref`, on the same base
    - full training: a frozen copy of the model, or none with `--precompute_ref_log_probs true`

    Args:
        trainer_class: TRL's DPOTrainer, or a class that extends it.
        args, train_args, model, adapter, data, collator, tokenizer: as for a task's `build_trainer`.
    """
    from peft import PeftModel

    class Trainer(PreparedPairsMixin, trainer_class):
        pass

    if adapter is not None and args.init_lora_weights == "pissa":
        # with the adapter off the layers give (W0 - s B0 A0) x, so the reference needs a copy of the start
        model, adapter = with_pissa(model, adapter, needs_uniform_dtype(args, train_args)), None
    has_copy = isinstance(model, PeftModel)
    if has_copy:
        # TRL 1.16 adds the copy with this config, for which PEFT 0.21 would initialise PiSSA and overwrite W0
        config = model.peft_config["default"]
        start, config.init_lora_weights = config.init_lora_weights, True
    if train_args.precompute_ref_log_probs:
        # TRL 1.16 caches log-probabilities by fingerprints of rows and weights, but they also depend on these
        for dataset in filter(None, (data.train, data.eval)):
            dataset._fingerprint += f"-{args.precision}-{train_args.ld_alpha}"
    needs_model = not adapter_of(args).is_adapter and not train_args.precompute_ref_log_probs
    reference = load_model(args, train_args) if needs_model else None
    parts = (args, train_args, model, adapter, data, collator, tokenizer)
    trainer = make_trainer(Trainer, *parts, ref_model=reference)
    if has_copy:
        # the adapter_config.json of the checkpoints names the start again
        trainer.model.peft_config["default"].init_lora_weights = start
        # PEFT 0.21 would also save `ref`, which is in the folder that it was loaded from
        save = trainer.model.save_pretrained
        trainer.model.save_pretrained = functools.partial(save, selected_adapters=["default"])
    return trainer


def gather_uneven(gather, counts: list[int], here: int, values):
    """As accelerate's `gather`, if the processes have different numbers of pairs.

    Args:
        gather: accelerate's, which needs tensors of one size.
        counts: how many pairs of each process count, [processes].
        here: how many pairs the batch of this process has.
        values: a metric of each pair, [here], or one number; other tensors are gathered unchanged.

    Returns:
        [sum of counts], or a number of each process that has pairs
    """
    if values.ndim != 1 or len(values) != here:
        return gather_counted(gather, counts, values)
    padded = values.new_zeros(max(counts))
    padded[:here] = values
    parts = gather(padded).view(len(counts), -1)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def count_pairs(batch: dict) -> int:
    """The number of pairs in a batch of either collator; 0 for a batch that only fills up a step."""
    return 0 if batch.get("source") == [] else _size(batch)


def _size(batch: dict) -> int:
    rows = len(batch["completion_mask"]) if "completion_mask" in batch else int(batch["row"][-1, -1]) + 1
    return rows // 2
