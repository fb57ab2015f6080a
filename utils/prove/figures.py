"""The figures of a proof: come to in two ways, and how far they are apart."""

import math
from dataclasses import dataclass, field
from typing import Any

POSITIONS = 64  # of each row so many logits are compared, the last ones: a large vocabulary makes them large


class DoesNotApply(Exception):
    """A proof that says nothing in this setting; its text completes "does not apply: …"."""


class ProofFailed(Exception):
    """A proof that could not be brought to its end; its text says why."""


@dataclass(frozen=True)
class Measure:
    """One figure, come to in two ways.

    Attributes:
        what: the figure's name.
        expected: the one way's; `found` the other's.
        difference: between the two, in the unit of `tolerance`.
        tolerance: the largest difference that rounding explains.
        unit: "relative", or what the figures count.
    """

    what: str
    expected: float
    found: float
    difference: float
    tolerance: float
    unit: str = "relative"

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance  # not for nan


class Count(Measure):
    """How many of some things hold, with a unit such as "of 4"."""


def relative(what: str, expected: float, found: float, tolerance: float) -> Measure:
    """Two figures, by |found - expected| / |expected|."""
    difference = abs(found - expected) / abs(expected) if expected else abs(found)
    return Measure(what, expected, found, difference, tolerance)


def worst(measures: list[Measure]) -> Measure:
    """The one that differs most; one that is no number before all."""
    return max(measures, key=lambda one: math.inf if math.isnan(one.difference) else one.difference)


@dataclass
class Verdict:
    """What a proof came to.

    Attributes:
        measures: the figures; none where it does not apply.
        why_not: why it does not apply.
        failure: why it could not be brought to its end.
    """

    measures: list[Measure] = field(default_factory=list)
    why_not: str | None = None
    failure: str | None = None

    @property
    def holds(self) -> bool | None:
        """None where it does not apply."""
        if self.why_not is not None:
            return None
        return self.failure is None and bool(self.measures) and all(measure.holds for measure in self.measures)


@dataclass
class Gradients:
    """What a step comes to.

    Attributes:
        loss: the mean over the trained tokens, or pairs.
        of: name → gradient of each trained weight.
    """

    loss: float
    of: dict[str, Any]

    def norm(self) -> float:
        return sum(float(gradient.double().square().sum()) for gradient in self.of.values()) ** 0.5


def logits_of(model, rows: list[list[int]]) -> list:
    """The logits of the last positions of each row of token ids, on the CPU, [at most `POSITIONS`, vocabulary] each."""
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
    """The largest difference of any logit, relative to the largest logit."""
    import torch

    theirs, ours = torch.cat(expected), torch.cat(found)
    size = float(theirs.abs().max())
    return Measure(what, size, float(ours.abs().max()), float((ours - theirs).abs().max()) / size, tolerance)
