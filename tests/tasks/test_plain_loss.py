"""The loss that `prove` compares with is exact also with the vocabulary and the peaked logits of a real model."""

from types import SimpleNamespace

import torch

from utils.tasks.plain_loss import cross_entropy

VOCABULARY = 49_152


class _Model:
    """Returns the same logits for any input."""

    device = "cpu"

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits)


def test_the_loss_of_a_large_vocabulary_is_that_of_float64():
    """torch's log_softmax in float32 is off by 9e-6 here: it adds many small terms to a large one."""
    targets = torch.arange(16)
    logits = torch.randn(1, 17, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    logits[0, torch.arange(16), targets] = 16.0
    settings = SimpleNamespace(loss_type="nll", label_smoothing_factor=0.0)
    trainer = SimpleNamespace(model=_Model(logits), args=settings)
    row = {"input_ids": [0] * 17, "labels": [-100, *targets.tolist()]}
    exact = logits[0, :-1].double()
    expected = (exact.exp().sum(dim=1).log() - exact[torch.arange(16), targets]).mean()
    assert abs(float(cross_entropy(trainer, [row])) / float(expected) - 1) < 1e-7
