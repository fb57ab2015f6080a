"""Proofs that a step is that of the plain model however its rows are laid out: padded, end to end, packed."""

import copy
import dataclasses

from utils.data.collate import build_collator
from utils.prove.figures import DoesNotApply, Gradients, Measure, ProofFailed, relative, worst
from utils.prove.subject import Subject, quiet

# float32 has 7 digits, and a sum of a thousand terms in another order loses one or two of them
LOSS = 1e-5
GRADIENTS = 1e-4  # of all weights, and of each: through all layers, forward and back
_SMALL = 1e-3  # of the whole gradient's norm; what is smaller than that is measured against it


def padded(subject: Subject) -> list[Measure]:
    """Rows padded against each row alone through the plain model."""
    reference = subject.reference
    if not subject.reference_is_plain:
        raise DoesNotApply("this loss is not written out; the other proofs compare with the trainer's own, padded")
    return compare(reference, subject.step([subject.collator(padding_free=False)(subject.rows)]))


def padding_free(subject: Subject) -> list[Measure]:
    """Rows end to end against each row alone."""
    if not subject.task.supports_padding_free:
        raise DoesNotApply(f"--task_type {subject.args.task_type} takes padded rows only")
    _needs_end_to_end(subject)
    return compare(subject.reference, subject.step([subject.collator(padding_free=True)(subject.rows)]))


def packed(subject: Subject) -> list[Measure]:
    """Rows that `--packing true` puts into one, against each row alone."""
    if not subject.task.supports_packing:
        raise DoesNotApply(f"rows of --task_type {subject.args.task_type} are not packed")
    _needs_end_to_end(subject)
    rows = _pack(subject)
    collate = build_collator(subject.tokenizer.pad_token_id, padding_free=True)
    return compare(subject.reference, subject.step([collate(rows)]))


def _needs_end_to_end(subject: Subject) -> None:
    subject.trainer  # noqa: B018  builds it: the model is probed on the way
    if reason := subject.layout.end_to_end:
        raise DoesNotApply(f"rows are always padded, since the model {reason}")


def _pack(subject: Subject) -> list[dict]:
    """The same rows, packed as the task packs them."""
    length = subject.args.max_len
    if subject.task.packing_splits_rows:
        # texts may go on in the next row, which is meant to be another loss; here all of them fit
        length = sum(map(subject.task.row_type.length, subject.rows))
    args = dataclasses.replace(
        subject.args, max_len=length, train_data_path=subject.rows_file(), eval_data_path=None, val_size=0.0,
        cache_dir=str(subject.scratch / "packed"),
    )  # fmt: skip
    settled = copy.copy(subject.train_args)
    settled.packing = settled.padding_free = True
    with quiet():
        data = subject.task.load_datasets(args, settled, subject.template, subject.tokenizer)
    return list(data.train)


def accumulation(subject: Subject) -> list[Measure]:
    """Rows one at a time, their gradients accumulated, against one batch of all of them."""
    collate = subject.collator(subject.task.lays_end_to_end(subject.train_args))
    return compare(subject.reference, subject.step([collate([row]) for row in subject.rows]))


def compare(expected: Gradients, found: Gradients) -> list[Measure]:
    """Loss, norm of the gradients, and the gradient of the weight that differs most, |g' - g| / |g|."""
    if other := sorted(expected.of.keys() ^ found.of.keys()):
        raise ProofFailed(f"only one of the two ways gives {other[0]} a gradient")
    whole = expected.norm()
    least = max(_SMALL * whole, 1e-30)
    each = []
    for name, gradient in expected.of.items():
        ours, size = found.of[name].detach().cpu(), float(gradient.norm())
        difference = float((ours - gradient).norm()) / max(size, least)
        each.append(Measure(f"gradient of {name}", size, float(ours.norm()), difference, GRADIENTS))
    return [
        relative("loss", expected.loss, found.loss, LOSS),
        relative("norm of all gradients", whole, found.norm(), GRADIENTS),
        worst(each),
    ]
