"""Proofs that a training step equals the plain model's: padded, padding-free, packed and accumulated batches."""

import copy
import dataclasses

from utils.data.collate import build_collator
from utils.prove.figures import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    DoesNotApply,
    Gradients,
    Measure,
    ProofFailed,
    relative,
    worst,
)
from utils.prove.subject import Subject, quiet

_SMALL = 1e-3  # share of the norm of all gradients; smaller gradients are compared relative to it


def padded(subject: Subject) -> list[Measure]:
    """Compares a padded batch with each row alone through the plain model."""
    reference = subject.reference
    if not subject.reference_is_plain:
        raise DoesNotApply("this loss is not written out; the other proofs compare with the trainer's own, padded")
    return compare(reference, subject.step([subject.collator(padding_free=False)(subject.rows)]))


def padding_free(subject: Subject) -> list[Measure]:
    """Compares a padding-free batch with each row alone."""
    if not subject.task.supports_padding_free:
        raise DoesNotApply(f"--task_type {subject.args.task_type} takes padded rows only")
    _needs_end_to_end(subject)
    return compare(subject.reference, subject.step([subject.collator(padding_free=True)(subject.rows)]))


def packed(subject: Subject) -> list[Measure]:
    """Compares the rows of `--packing true` with each row alone."""
    if not subject.task.supports_packing:
        raise DoesNotApply(f"rows of --task_type {subject.args.task_type} are not packed")
    _needs_end_to_end(subject)
    rows = _pack(subject)
    collate = build_collator(subject.tokenizer.pad_token_id, padding_free=True)
    return compare(subject.reference, subject.step([collate(rows)]))


def _needs_end_to_end(subject: Subject) -> None:
    subject.trainer  # noqa: B018  the property builds it, which also probes the model
    if reason := subject.layout.end_to_end:
        raise DoesNotApply(f"rows are always padded, since the model {reason}")


def _pack(subject: Subject) -> list[dict]:
    """Packs the rows as the task does."""
    length = subject.args.max_len
    if subject.task.packing_splits_rows:
        # split texts have another loss by design, so the rows are made long enough for all texts
        length = sum(map(subject.task.row_type.length, subject.rows))
    args = dataclasses.replace(
        subject.args, max_len=length, train_data_path=subject.rows_file(), eval_data_path=None, val_size=0.0,
        cache_dir=str(subject.scratch / "packed"),
    )  # fmt: skip
    packed_args = copy.copy(subject.train_args)
    packed_args.packing = packed_args.padding_free = True
    with quiet():
        data = subject.task.load_datasets(args, packed_args, subject.template, subject.tokenizer)
    return list(data.train)


def accumulation(subject: Subject) -> list[Measure]:
    """Compares batches of one row with accumulated gradients with one batch of all rows."""
    collate = subject.collator(subject.task.lays_end_to_end(subject.train_args))
    return compare(subject.reference, subject.step([collate([row]) for row in subject.rows]))


def compare(expected: Gradients, found: Gradients) -> list[Measure]:
    """Compares loss, norm of all gradients, and the gradient of the weight that differs most, |g' - g| / |g|."""
    if other := sorted(expected.of.keys() ^ found.of.keys()):
        raise ProofFailed(f"only one of the two ways gives {other[0]} a gradient")
    whole = expected.norm()
    least = max(_SMALL * whole, 1e-30)
    each = []
    for name, gradient in expected.of.items():
        ours, size = found.of[name].detach().cpu(), float(gradient.norm())
        difference = float((ours - gradient).norm()) / max(size, least)
        each.append(Measure(f"gradient of {name}", size, float(ours.norm()), difference, GRADIENT_TOLERANCE))
    return [
        relative("loss", expected.loss, found.loss, LOSS_TOLERANCE),
        relative("norm of all gradients", whole, found.norm(), GRADIENT_TOLERANCE),
        worst(each),
    ]
