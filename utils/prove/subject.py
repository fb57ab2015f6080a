"""The model, rows and settings that proofs run on, in float32, and the training steps they compare."""

import copy
import dataclasses
import functools
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loguru import logger

from utils.data.files import read_rows
from utils.data.load_sources import refuse_unless_plain
from utils.data.places import row_location
from utils.data.prepare import Data
from utils.model.adapter import adapter_of, build_adapter
from utils.model.layout import resolve_padding_free
from utils.model.load import load_model, with_trained_adapter
from utils.model.probe_state import leave_dropout_out
from utils.model.tokenizer import load_run_tokenizer
from utils.prove.figures import Gradients, logits_of
from utils.runtime.errors import UserError
from utils.template import get_run_template
from utils.train.trainer import prepare_trainer


class Subject:
    """A user's model, rows and settings. The model is loaded once, when the first proof needs it.

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument.
        count: how many rows are used.
        dropout: of the adapters, as set by the user; in `args` it is 0, so that two steps can be compared.
        flags: of main_train.py, for proofs that start it.
        scratch: a folder that is removed afterwards.

    Raises:
        UserError: fewer than two rows can be trained on.
    """

    def __init__(self, args, train_args, count: int, dropout: float, flags: list[str], scratch: Path):
        refuse_unless_plain(args, "utils.script.prove")
        self.args, self.train_args = args, train_args
        self.dropout, self.flags, self.scratch = dropout, flags, scratch
        self.task = args.task
        self.tokenizer = load_run_tokenizer(args)
        self.template = get_run_template(args, self.tokenizer) if self.task.uses_template else None
        self.data = self._choose(count)
        self.rows: list[dict] = list(self.data.train)
        self.base_logits: list = []
        self._start: dict = {}

    # ------------------------------------------------------------------ rows
    def _choose(self, count: int) -> Data:
        """Chooses rows spread over all lengths, with the shortest and the longest, in the order of the files."""
        data = self.task.load_datasets(self.args, self.train_args, self.template, self.tokenizer)
        if len(data.train) < 2:
            raise UserError(
                f"--train_data_path {self.args.train_data_path!r} has one row to train on, and the proofs need two at "
                "least; give more rows"
            )
        lengths = [self.task.row_type.length(row) for row in data.train]
        places = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
        count = min(count, len(places))
        chosen = sorted(places[round(i * (len(places) - 1) / (count - 1))] for i in range(count))
        lengths = [lengths[place] for place in chosen]
        logger.info(
            "proved in float32 on {} rows of {} to {} tokens: line {} of {}",
            count, min(lengths), max(lengths), ", ".join(str(row_location(data.train[i])[1]) for i in chosen),
            ", ".join(data.report.files),
        )  # fmt: skip
        if len(set(lengths)) == 1:
            logger.warning(
                "all of these rows are of one length, which puts padding and accumulation hardly to the test"
            )
        return dataclasses.replace(data, train=data.train.select(chosen), eval=None, stream=None, order=None)

    @functools.cached_property
    def raw_rows(self) -> list[Any]:
        """The raw rows from the data files, one for each of `rows`."""
        places = [row_location(row) for row in self.rows]
        found: dict = {}
        for number in {number for number, _ in places}:
            lines = {line for file, line in places if file == number}
            for raw in read_rows(self.data.report.files[number]):
                if raw.line in lines:
                    found[number, raw.line] = raw.value
                    lines.remove(raw.line)
                if not lines:
                    break
        return [found[place] for place in places]

    def rows_file(self, count: int | None = None) -> str:
        """Writes the first `count` raw rows to a file, all by default; returns its path."""
        rows = self.raw_rows[:count]
        file = self.scratch / f"rows-{len(rows)}.jsonl"
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        file.write_text("".join(lines), encoding="utf-8")
        return str(file)

    def sequences(self) -> list[list[int]]:
        """The token ids of the first sequence of each row, [rows, tokens]."""
        return [self.task.row_type.sequences(row)[0].input_ids for row in self.rows]

    # ------------------------------------------------------------------ model
    @functools.cached_property
    def trainer(self):
        """The task's own trainer. Trainable weights are perturbed so that no gradient is trivially zero."""
        from transformers import set_seed

        set_seed(self.train_args.seed)
        args, train_args = self.args, self.train_args
        model = load_model(dataclasses.replace(args, adapter_name_or_path=None), train_args)
        if self.has_adapter and args.init_lora_weights != "pissa":
            if not adapter_of(args).quantised:
                model.to(train_args.device)
            self.base_logits = logits_of(model, self.sequences())
        if args.adapter_name_or_path:
            model = with_trained_adapter(model, args)
        self.layout = resolve_padding_free(args, train_args, self.task, model, self.tokenizer)
        adapter = build_adapter(args, model, self.tokenizer, self.template)
        collator = self.collator(self.task.lays_end_to_end(train_args))
        trainer = self.task.build_trainer(args, train_args, model, adapter, self.data, collator, self.tokenizer)
        prepare_trainer(trainer, args, self.template, self.tokenizer)
        if train_args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(train_args.gradient_checkpointing_kwargs)
        if getattr(trainer, "aux_loss_enabled", False):
            logger.info("the balance of the model's experts is left out: it is of a whole batch, and not of its tokens")
            trainer.aux_loss_enabled = False
        leave_dropout_out(trainer.model)
        self.perturb_weights(trainer.model)
        return trainer

    @property
    def has_adapter(self) -> bool:
        return adapter_of(self.args).is_adapter

    def perturb_weights(self, model) -> None:
        """Adds noise to the trainable weights: LoRA's B starts at zero, and DPO's policy equals its reference."""
        import torch

        if not self.has_adapter and not self.task.needs_reference:
            return
        generator = torch.Generator().manual_seed(self.train_args.seed)
        share = 0.1 if self.has_adapter else 0.01
        for name, weight in trained(model).items():
            if self.has_adapter:
                self._start[name] = weight.detach().cpu().clone()
            size = float(weight.detach().square().mean().sqrt())
            noise = torch.randn(weight.shape, generator=generator) * (share * size or 0.02)
            weight.data.add_(noise.to(weight))

    def restore_initial_weights(self) -> None:
        """Gives an adapter the weights that its training starts with."""
        for name, weight in trained(self.trainer.model).items():
            if name in self._start:
                weight.data.copy_(self._start[name])

    def release(self) -> None:
        """Frees the model's memory for processes that a proof starts."""
        import torch

        self.__dict__.pop("trainer", None)
        self.__dict__.pop("reference", None)
        gc.collect()
        torch.cuda.empty_cache()

    # ------------------------------------------------------------------ steps
    def collator(self, padding_free: bool):
        """Builds the task's own collator for padded or padding-free batches."""
        train_args = copy.copy(self.train_args)
        train_args.padding_free = padding_free
        return self.task.build_collator(self.args, train_args, self.tokenizer)

    @functools.cached_property
    def reference(self) -> Gradients:
        """Loss and gradients of the rows, each computed alone through the plain model.

        A task without a `plain_loss` has the trainer's own, of all rows in one padded batch.
        """
        trainer = self.trainer
        trainer.model.zero_grad(set_to_none=True)
        loss = self.task.plain_loss(trainer, self.rows) if self.task.plain_loss else None
        self.reference_is_plain = loss is not None
        if loss is None:
            found = self.step([self.collator(padding_free=False)(self.rows)])
        else:
            loss.backward()
            weights = trained(trainer.model)
            found = Gradients(loss.item(), {n: weight.grad for n, weight in weights.items() if weight.grad is not None})
        return Gradients(found.loss, {name: gradient.cpu().clone() for name, gradient in found.of.items()})

    def step(self, batches: list[dict]) -> Gradients:
        """Computes forward and backward of one step with the trainer's own functions, accumulating its batches.

        Returns:
            the loss, and the gradients, which are the model's own until the next step.
        """
        trainer = self.trainer
        trainer.model.zero_grad(set_to_none=True)
        samples, items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(samples)
        loss = sum(float(trainer.training_step(trainer.model, batch, items)) for batch in samples)
        weights = trained(trainer.model)
        return Gradients(loss, {name: weight.grad for name, weight in weights.items() if weight.grad is not None})


def trained(model) -> dict:
    """Returns the trainable weights by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@contextmanager
def quiet() -> Iterator[None]:
    """Disables the log of data preparation, for rows that were prepared before."""
    names = ("utils.data.cache", "utils.data.prepare", "utils.data.report")
    for name in names:
        logger.disable(name)
    try:
        yield
    finally:
        for name in names:
            logger.enable(name)
