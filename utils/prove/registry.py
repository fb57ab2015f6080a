"""The table of proofs about a user's own model and data, and the function that runs them.

Each proof computes the same values in two ways, in float32, so that any difference beyond rounding is a fault.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from loguru import logger

from utils.prove.batch_checks import accumulation, packed, padded, padding_free
from utils.prove.figures import GRADIENT_TOLERANCE, LOSS_TOLERANCE, DoesNotApply, Measure, ProofFailed, Verdict
from utils.prove.model_checks import MEMORISED_LOSS, MERGE_TOLERANCE, STEPS, adapter_off, merged, stops
from utils.prove.run_checks import SAVE_STEP, ranks, resumed
from utils.prove.subject import Subject
from utils.runtime.errors import UserError, in_one_line


class Proof(NamedTuple):
    """A row of the table.

    Attributes:
        says: what is proved.
        how: what is compared.
        tolerance: how far the values may be apart, and why.
        function: computes the values; raises `DoesNotApply` or `ProofFailed`.
    """

    says: str
    how: str
    tolerance: str
    function: Callable[[Subject], list[Measure]]


_SUMS = f"{LOSS_TOLERANCE:g} of the loss, {GRADIENT_TOLERANCE:g} of the gradients: float32 sums in another order"
# proofs that start processes come last, since they release the model before
PROOFS = {
    "padded": Proof(
        "plain transformers = padded",
        "each row alone through the model, its loss written out, and all rows in one padded batch: loss and gradients",
        _SUMS,
        padded,
    ),
    "padding_free": Proof(
        "plain transformers = padding-free",
        "each row alone, and all rows in one batch end to end: loss and gradients",
        _SUMS,
        padding_free,
    ),
    "packed": Proof(
        "plain transformers = packed",
        "each row alone, and all rows in one batch as --packing true packs them: loss and gradients",
        _SUMS,
        packed,
    ),
    "accumulation": Proof(
        "plain transformers = accumulation",
        "each row alone, and one row a batch with the gradients accumulated: loss and gradients",
        _SUMS,
        accumulation,
    ),
    "adapter_off": Proof(
        "base = adapter off",
        "the base's logits before it got an adapter, and with an adapter that is not zero switched off",
        "0: the same operations",
        adapter_off,
    ),
    "merged": Proof(
        "adapter = merged",
        "the logits of base and adapter, and of the merged model, saved and loaded again",
        f"{MERGE_TOLERANCE:g} of the largest logit: each layer rounds once instead of twice",
        merged,
    ),
    "stops": Proof(
        "what is generated stops",
        f"a few rows are trained until the loss is below {MEMORISED_LOSS:g}, {STEPS} steps at most; then the model "
        "generates their answers",
        "0: every answer ends by the template's stop token",
        stops,
    ),
    "resumed": Proof(
        "undisturbed = resumed",
        f"main_train.py to its end, and again from its checkpoint of step {SAVE_STEP}: losses and saved weights",
        "0 on a CPU: the same sums in the same order; 1e-4 on a GPU, whose kernels have no fixed order",
        resumed,
    ),
    "ranks": Proof(
        "one rank = two ranks",
        "main_train.py on one process and on two, the same rows a step: losses and gradients' norms",
        _SUMS,
        ranks,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """A proof that was run, with its result."""

    name: str
    proof: Proof
    verdict: Verdict
    seconds: float


def run_proofs(names: list[str], subject: Subject, begins: Callable[[str], object]) -> Iterator[Outcome]:
    """Runs proofs in the order of the table and yields each result as soon as it is known.

    Args:
        names: of `PROOFS`.
        subject: the model, rows and settings.
        begins: called with the name of each proof before it runs.

    Raises:
        UserError: the model cannot be loaded, or does not fit the memory.
    """
    for name in (name for name in PROOFS if name in names):
        begins(name)
        started = time.monotonic()
        verdict = _try(PROOFS[name], subject)
        yield Outcome(name, PROOFS[name], verdict, time.monotonic() - started)


def _try(proof: Proof, subject: Subject) -> Verdict:
    import torch

    try:
        return Verdict(proof.function(subject))
    except UserError:
        raise
    except DoesNotApply as why:
        return Verdict(why_not=str(why))
    except ProofFailed as why:
        return Verdict(failure=str(why))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{len(subject.rows)} rows of {subject.args.model_name_or_path!r} in float32 do not fit the GPU's memory; "
            "give a smaller --rows or a smaller --max_len, or leave these proofs out with --only"
        ) from error
    except Exception as error:  # a model's own code may raise anything, and the other proofs still run
        logger.opt(exception=error).debug("{}", proof.says)
        return Verdict(failure=f"{type(error).__name__}: {in_one_line(error, 300)}")
