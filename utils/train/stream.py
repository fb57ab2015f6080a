"""Trains on streamed rows: batches of row numbers, what became of the rows, and the position on a resume."""

import functools
import os
import signal
from collections.abc import Callable, Iterator

import torch
from loguru import logger
from torch.utils.data import BatchSampler, DataLoader

from utils.data.encode import EncodedChunk
from utils.data.report import DataReport, from_stored, to_stored
from utils.data.stream import STREAM_REPORT, RowOrder, RowStream, raise_refused, refused_rows
from utils.runtime.distributed import all_gather_objects
from utils.runtime.log import is_main_process
from utils.train.nonfinite import without_sources


class StreamBatches(BatchSampler):
    """The batches of one process: numbers of rows, the last batch filled up with the number of the empty row.

    Batch b of process p has the positions (b · processes + p) · size and following of the order, so a step has the same
    rows on any number of processes.

    `StreamBatches(order of 5 rows, 2, processes=2, process=1)` → `[[2, 3], [5, 5]]`, in the files' order
    """

    def __init__(self, order: RowOrder, batch_size: int, processes: int, process: int, drop_last: bool = False):
        self.order, self.batch_size, self.drop_last = order, batch_size, drop_last
        self.processes, self.process = processes, process
        self._skipped = 0

    def start_epoch(self, epoch: int, skipped: int) -> None:
        """Sets the epoch, and the number of batches that transformers takes and throws away on a resume."""
        self.order.set_epoch(epoch)
        self._skipped = skipped

    def __len__(self) -> int:
        full, rest = divmod(len(self.order), self.batch_size * self.processes)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        filler, size = len(self.order), self.batch_size
        yield from ([filler] * size for _ in range(self._skipped))  # never read, so no order is drawn for them
        for batch in range(self._skipped, len(self)):
            start = (batch * self.processes + self.process) * size
            rows = self.order.rows(start, start + size)
            yield rows + [filler] * (size - len(rows))


class StreamMixin:
    """A mix-in for transformers' Trainer: trains on a `RowStream`.

    Attributes:
        stream: the rows.
        row_type: of the rows.
    """

    stream: RowStream
    _epoch = 0
    _is_empty_step = False  # on all processes
    _is_empty_batch = False  # of this process

    def get_train_dataloader(self):
        accelerator, args = self.accelerator, self.args
        self.stream.empty = self.row_type.filler(self.stream.sample[0])
        processes, process = accelerator.num_processes, accelerator.process_index
        self._batches = StreamBatches(
            self.stream.order, self._train_batch_size, processes, process, args.dataloader_drop_last
        )
        loader = DataLoader(
            self.stream,
            batch_sampler=self._batches,
            collate_fn=functools.partial(collate_stream, self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=functools.partial(init_worker, args.dataloader_num_workers, args.process_index),
        )
        loader = accelerator.prepare(loader)
        if processes > 1:  # the batches are those of this process already, as of transformers' BatchRebalanceSampler
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        return loader

    def _run_epoch(self, *args, epoch, epochs_trained, resume_from_checkpoint, steps_trained_in_current_epoch, **more):
        is_resumed = epoch == epochs_trained and resume_from_checkpoint is not None
        self._epoch = epoch
        self._batches.start_epoch(epoch, steps_trained_in_current_epoch if is_resumed else 0)
        more |= {"resume_from_checkpoint": resume_from_checkpoint, "epoch": epoch, "epochs_trained": epochs_trained}
        super()._run_epoch(*args, steps_trained_in_current_epoch=steps_trained_in_current_epoch, **more)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        reports = [report for batch in batches for report in _take_reports(batch)]
        refused = [report for report in reports if refused_rows(report, self.stream.encoder)]
        sources = [without_sources(batch)[1] for batch in batches]
        empty = [batch for batch, real in zip(batches, sources, strict=True) if not real]
        here = [len(refused), sum(map(len, sources)), sum(map(_count_tokens, empty))]
        all_refused, rows, tokens = self.accelerator.reduce(torch.tensor(here, device=device), "sum").tolist()
        if all_refused:  # on every process, as on any of them
            raise_refused(all_gather_objects(refused), self.stream.encoder, self.how_to_resume())
        if self._epoch == 0:  # later epochs read the same rows
            for report in reports:
                self._seen.add_chunk(report)
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens -= tokens  # TRL 1.16 will add them
        self._is_empty_step = not rows
        if self._is_empty_step:
            logger.warning("step {}: all of its rows are dropped, nothing is trained", self.state.global_step + 1)
            count = None if count is None else count.clamp(min=1)
        return batches, count

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._is_empty_batch = not without_sources(inputs)[1]
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # the row in place of dropped ones may have labels: by default it is a copy of the first
        return result * 0 if self.model.training and self._is_empty_batch and not return_outputs else result

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self._is_empty_step and not self.args.fp16:  # fp16's gradient scaler needs gradients
            model.zero_grad(set_to_none=True)  # with zeros, AdamW's momentum and weight decay would move the weights
        return norm

    # ------------------------------------------------------------------ what became of the rows
    def _init_training_state(self, *args, **kwargs):
        found = super()._init_training_state(*args, **kwargs)
        kept = self.state.stateful_callbacks.get(STREAM_REPORT, {}).get("attributes")
        self._seen = from_stored(kept, self.stream.report.files) if kept and is_main_process() else DataReport()
        return found

    def _save_checkpoint(self, model, trial):
        self.state.stateful_callbacks[STREAM_REPORT] = {"args": {}, "attributes": to_stored(self._count_seen())}
        super()._save_checkpoint(model, trial)

    def _count_seen(self) -> DataReport:
        """Adds the reports of all processes up, and copies the sums into that of the stream."""
        total = DataReport()
        for report in all_gather_objects([self._seen]):
            total.merge(report)
        self.stream.report.take_counts(total)
        return total

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self._count_seen().log("train data, as it was streamed")
        return result


def collate_stream(collate: Callable, rows: list[dict]):
    """Collates a batch of a `RowStream`; what became of its rows stays beside the tensors, under STREAM_REPORT."""
    first = dict(rows[0])
    reports = first.pop(STREAM_REPORT)
    batch = collate([first, *rows[1:]])
    if isinstance(batch, list):  # of a task without a collator
        return [{**batch[0], STREAM_REPORT: reports}, *batch[1:]]
    return {**batch, STREAM_REPORT: reports}


def _take_reports(batch) -> list[EncodedChunk]:
    return (batch[0] if isinstance(batch, list) else batch).pop(STREAM_REPORT)


def _count_tokens(batch) -> int:
    """The tokens of a batch as TRL 1.16 counts them."""
    if isinstance(batch, list):
        return 0
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["position_ids"].numel()


def init_worker(workers: int, rank: int, worker: int) -> None:
    """Seeds a data loader's worker as transformers does, and leaves signals to the main process."""
    from transformers.trainer_utils import seed_worker

    seed_worker(worker, workers, rank)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
