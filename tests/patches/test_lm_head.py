"""The head under training: only labelled positions go through it, and a frozen one equals plain log-softmax."""

import pytest
import torch

from utils.patches import lm_head as head
from utils.patches.lm_head import frozen_head, use_trained_positions


def plain(hidden, weight, targets):
    logits = (hidden @ weight.T).float()
    log_probs = logits.log_softmax(dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    return log_probs.gather(1, targets[:, None])[:, 0], entropy, logits.argmax(dim=1) == targets


@pytest.fixture
def scored():
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5)
    targets = (hidden @ weight.T).argmax(dim=1)
    targets[:3] = torch.tensor([0, 10, 4])
    return hidden, weight, targets


@pytest.mark.parametrize("tile", [1, 22, 1000], ids=["a row", "two rows", "all"])
def test_equals_plain_log_softmax(scored, tile, monkeypatch):
    monkeypatch.setattr(head, "TILE", tile)
    hidden, weight, targets = scored
    weights = torch.randn(7)  # of the loss, another for each position
    found, expected = frozen_head(*scored), plain(*scored)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (ours,) = torch.autograd.grad((found[0] * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((expected[0] * weights).sum(), hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_of_equal_logits_the_first_is_the_likeliest():
    weight = torch.tensor([[1.0], [1.0], [0.0]])
    is_top1 = frozen_head(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]))[2]
    assert is_top1.tolist() == [True, False, False]


def test_logits_far_from_zero_neither_overflow_nor_vanish():
    hidden = torch.tensor([[1e4], [-1e4]])
    log_probs, entropy, _ = frozen_head(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    assert log_probs.tolist() == [0.0, -2e4] and entropy.tolist() == pytest.approx([0, 0], abs=1e-2)


def test_bf16_is_as_near_to_float32_as_trls(scored):
    from trl.kernels import ChunkedLogProbFunction

    torch.manual_seed(1)
    hidden, weight, targets = torch.randn(64, 32), torch.randn(500, 32) / 4, torch.randint(0, 500, (64,))
    exact = plain(hidden.bfloat16().float(), weight.bfloat16().float(), targets)[0]
    (towards,) = torch.autograd.grad(plain(h := hidden.bfloat16().float().requires_grad_(), weight.bfloat16().float(),
                                           targets)[0].sum(), h)  # fmt: skip
    rounded = hidden.bfloat16().requires_grad_()

    def far(log_probs):
        (gradient,) = torch.autograd.grad(log_probs.sum(), rounded)
        assert gradient.dtype == torch.bfloat16
        return (log_probs - exact).abs().max().item(), (gradient.float() - towards).norm().item()

    given = (rounded, weight.bfloat16(), None, targets, 1.0, 100, None, 1.0, ("log_probs",))
    for ours, theirs in zip(far(frozen_head(rounded, weight.bfloat16(), targets)[0]),
                            far(ChunkedLogProbFunction.apply(*given)[0]), strict=True):  # fmt: skip
        assert ours <= 1.2 * theirs + 1e-6


def test_figures_it_does_not_have_are_left_to_trl(scored):
    import trl.trainer.utils as of_trl

    use_trained_positions()
    hidden, weight, targets = scored
    outputs = ("log_probs", "mean_logits", "log_sum_sq_probs")
    given = (hidden, weight, None, targets, 1.0, 100, None, 1.0, outputs)
    log_probs, _, sum_sq, mean, _ = of_trl._ChunkedLogProbFunction.apply(*given)
    torch.testing.assert_close(log_probs, plain(*scored)[0])
    torch.testing.assert_close(mean, (hidden @ weight.T).mean(dim=1))
    assert sum_sq is not None


@pytest.mark.parametrize(
    "changed",
    [{"temperature": 0.7}, {"softcap": 1.5}, {"scale": 0.25}, {"bias": True},
     {"temperature": 2.0, "softcap": 3.0, "scale": 4.0, "bias": True}],
    ids=["temperature", "softcap", "scale", "bias", "all"],
)  # fmt: skip
def test_changed_logits_under_a_frozen_head_equal_a_plain_softmax(scored, changed):
    """Caps, scales and biases as the models' own forward has them, gradient included."""
    import trl.trainer.utils as of_trl

    use_trained_positions()
    hidden, weight, targets = scored
    temperature, softcap, scale = changed.get("temperature", 1.0), changed.get("softcap"), changed.get("scale", 1.0)
    bias = torch.linspace(-2, 2, len(weight)) if changed.get("bias") else None
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    log_probs = (logits / temperature).log_softmax(dim=1)
    expected = log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(dim=1)
    outputs = ("log_probs", "entropy", "is_top1")
    given = (hidden, weight, bias, targets, temperature, 256, softcap, scale, outputs)
    found = of_trl._ChunkedLogProbFunction.apply(*given)
    for ours, theirs in zip(found[:2], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[4], logits.argmax(dim=1) == targets)
    (ours,), (theirs,) = (torch.autograd.grad(one.square().sum(), hidden) for one in (found[0], expected[0]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_only_labelled_positions_go_through_the_head(trained, tiny_models, monkeypatch):
    import trl.trainer.utils as of_trl
    from transformers import AutoModelForCausalLM

    use_trained_positions()
    use_trained_positions()  # once is enough
    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    model.get_output_embeddings().weight.requires_grad_(trained)
    of_trl.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    seen, apply = [], of_trl._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        of_trl._ChunkedLogProbFunction,
        "apply",
        lambda hidden, *given: seen.append(len(hidden)) or apply(hidden, *given),
    )
    ids = torch.arange(2, 22).view(2, 10)
    labels = ids.masked_fill(torch.arange(10) < 7, -100)
    found = model(ids, labels=labels, fused_lm_head=True)
    assert seen == [6] and found.log_probs.shape == (2, 9) and found.label_mask.sum() == 6
    expected = model(ids).logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.log_probs, expected.masked_fill(labels[:, 1:] == -100, 0), rtol=1e-5, atol=1e-5)


def test_a_step_with_nothing_to_train_has_a_loss_of_zero_and_gradients(tiny_models):
    import trl.trainer.utils as of_trl
    from transformers import AutoModelForCausalLM

    use_trained_positions()
    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    model.get_output_embeddings().weight.requires_grad_(False)
    of_trl.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.arange(2, 12)[None]
    log_probs = model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True).log_probs
    log_probs.sum().backward()
    assert log_probs.eq(0).all() and model.model.norm.weight.grad.eq(0).all()


@pytest.mark.slow
def test_a_compiled_step_has_the_same_figures(scored):
    """Under --torch_compile, which refuses what the frozen head writes in place, TRL's own function is taken."""
    import trl.trainer.utils as of_trl

    use_trained_positions()

    def step(hidden, weight, targets):
        outputs = ("log_probs", "entropy", "is_top1")
        return of_trl._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 256, None, 1.0, outputs)[0]

    found, expected = torch.compile(step)(*scored), plain(*scored)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (ours,), (theirs,) = (torch.autograd.grad(one.sum(), scored[0]) for one in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
