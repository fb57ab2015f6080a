"""Measures and verdicts."""

import torch

from utils.prove.figures import Measure, Verdict, same_logits, worst


def test_nan_never_holds():
    nan = float("nan")
    assert not Measure("loss", 1.0, nan, nan, 1e-5).holds
    close = Measure("loss", 1.0, 1.0, 0.0, 1e-5)
    assert worst([close, Measure("loss", 1.0, nan, nan, 1e-5), close]).found != worst([close]).found
    broken = [torch.tensor([[1.0, nan]]), torch.tensor([[1.0, 2.0]])]
    assert not same_logits("", broken, broken, 1.0).holds
    assert Verdict().holds is False and Verdict(why_not="…").holds is None
