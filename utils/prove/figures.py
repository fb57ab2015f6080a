"""Measurements of a proof: a value computed in two ways, and how far the results are apart."""

import math
from dataclasses import dataclass, field
from typing import Any

# float32 has 7 digits; a sum of a thousand terms in another order changes the last one or two
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # of all weights and of each one, through all layers forward and backward

POSITIONS = (
    64  # the last positions of each row whose logits are compared; with a large vocabulary they take much memory
)


class DoesNotApply(Exception):
    """Raised by a proof that does not apply to this setting; its text completes "does not apply: …"."""


class ProofFailed(Exception):
    """Raised by a proof that could not be completed; its text is the reason."""


@dataclass(frozen=True)
class Measure:
    """A value computed in two ways.

    Attributes:
        what: the value's name.
        expected: the value computed in the reference way; `found`: in the other way.
        difference: between the two, in the unit of `tolerance`.
        tolerance: the largest difference that rounding explains.
        unit: "relative", or what is counted.
    """

    what: str
    expected: float
    found: float
    difference: float
    tolerance: float
    unit: str = "relative"

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance  # False for nan


class Count(Measure):
    """A number of cases that hold, with a unit such as "of 4"."""


def relative(what: str, expected: float, found: float, tolerance: float) -> Measure:
    """Compares two values by |found - expected| / |expected|."""
    difference = abs(found - expected) / abs(expected) if expected else abs(found)
    return Measure(what, expected, found, difference, tolerance)


def worst(measures: list[Measure]) -> Measure:
    """Returns the measure with the largest difference; nan counts as the largest."""
    return max(measures, key=lambda item: math.inf if math.isnan(item.difference) else item.difference)


@dataclass
class Verdict:
    """The result of a proof.

    Attributes:
        measures: empty if it does not apply.
        why_not: why it does not apply.
        failure: why it could not be completed.
    """

    measures: list[Measure] = field(default_factory=list)
    why_not: str | None = None
    failure: str | None = None

    @property
    def holds(self) -> bool | None:
        """Whether all measures hold; None if the proof does not apply."""
        if self.why_not is not None:
            return None
        return self.failure is None and bool(self.measures) and all(measure.holds for measure in self.measures)


@dataclass
class Gradients:
    """The result of a training step.

    Attributes:
        loss: the mean over the trained tokens, or pairs.
        of: name → gradient of each trained weight.
    """

    loss: float
    of: dict[str, Any]

    def norm(self) -> float:
        return sum(float(gradient.double().square().sum()) for gradient in self.of.values()) ** 0.5


def logits_of(model, rows: list[list[int]]) -> list:
    """Computes the logits of each row's last positions, on the CPU, [at most `POSITIONS`, vocabulary] for each row."""
    import torch

    was_training, found = model.training, []
    model.eval()
    with torch.no_grad():
        for ids in rows:
            inputs = torch.tensor([ids], device=model.device)
            found.append(model(input_ids=inputs, use_cache=False).logits[0, -POSITIONS:].float().cpu())
    model.train(was_training)
    return found


def same_logits(what: str, expected: list, found: list, tolerance: float) -> Measure:
    """Compares logits by their largest difference, relative to the largest logit."""
    import torch

    theirs, ours = torch.cat(expected), torch.cat(found)
    size = float(theirs.abs().max())
    return Measure(what, size, float(ours.abs().max()), float((ours - theirs).abs().max()) / size, tolerance)
