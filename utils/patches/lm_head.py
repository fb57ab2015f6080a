"""The language-model head under training: only labelled positions go through it, and its logits never all exist.

TRL scores every position where there is no Triton, prompts and padding too, and computes each tile of logits twice.
"""

import functools
from types import SimpleNamespace

TILE = 8_000_000  # logits at once, some 50 MB with what is computed of them


def use_trained_positions() -> None:
    """Has TRL's fused head score only the labelled positions on the CPU too, and frozen heads in one pass."""
    import trl.trainer.utils as of_trl

    if not isinstance(of_trl._ChunkedLogProbFunction, SimpleNamespace):
        scored = of_trl._ChunkedLogProbFunction.apply
        of_trl._ChunkedLogProbFunction = SimpleNamespace(apply=lambda *given: _apply(scored, *given))
        # asked only whether to leave out what is not labelled; the kernels ask by a name of their own
        of_trl._use_triton = lambda device: device.type != "xla"


def _apply(scored, hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
    """TRL's function where the head is trained or its logits are changed, ours where it is frozen."""
    import torch

    plain = bias is None and not weight.requires_grad and (temperature, softcap, scale) == (1.0, None, 1.0)
    asked = set(outputs) <= {"log_probs", "entropy", "is_top1"}  # DPO asks for more
    compiling = torch.compiler.is_compiling()  # then what is written in place here is refused
    if not plain or not asked or compiling or hidden.device.type != "cpu" or not len(hidden):
        return scored(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs)
    log_probs, entropy, is_top1 = frozen_head(hidden, weight, targets)
    return log_probs, entropy, None, None, is_top1


def frozen_head(hidden, weight, targets):
    """The log-probabilities of `targets` under a head that is not trained.

    With z = W h and p = softmax(z), log p_y = z_y - log Σ exp(z), and its gradient in h is W_y - Wᵀ p: known with the
    logits already at hand, so that nothing has to be computed again in the backward pass.

    Args:
        hidden: the last layer's states of the scored positions, [N, H].
        weight: the head, [V, H].
        targets: the tokens that follow, [N].

    Returns:
        log-probabilities [N], differentiable in `hidden`; entropies in nats [N]; whether the target is the likeliest
        token [N].
    """
    return _frozen_head().apply(hidden, weight, targets)


@functools.cache
def _frozen_head():
    """The autograd function, made once: torch is imported where it is used."""
    import torch

    class FrozenHead(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            kind = hidden.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
            states, head = hidden.to(dtype), weight.to(dtype)
            rows = min(len(states), max(1, TILE // len(head)))
            room = [torch.empty(rows, len(head), dtype=of) for of in (dtype, torch.float32)]
            parts = [
                _score(*tile, head, *(buffer[: len(tile[0])] for buffer in room))
                for tile in zip(states.split(rows), targets.split(rows), strict=True)
            ]
            log_probs, entropy, is_top1, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
            ctx.save_for_backward(gradient)
            ctx.dtype = hidden.dtype
            ctx.mark_non_differentiable(entropy, is_top1)
            return log_probs, entropy, is_top1

        @staticmethod
        def backward(ctx, towards, *_):
            (gradient,) = ctx.saved_tensors
            return (towards[:, None] * gradient).to(ctx.dtype), None, None

    return FrozenHead


def _score(states, targets, head, logits, odds):
    """One tile, in the room given for it; float32 from the logits on, as the loss is elsewhere."""
    import torch

    torch.mm(states, head.T, out=logits)
    highest = logits.amax(dim=1, keepdim=True)
    chosen = logits.gather(1, targets[:, None])
    is_top1 = (chosen == highest)[:, 0]
    is_top1[is_top1.clone()] = logits[is_top1].argmax(dim=1) == targets[is_top1]  # of equals the first is said
    odds.copy_(logits).sub_(highest).exp_()  # p times their sum, at most 1
    total = odds.sum(dim=1, keepdim=True)
    log_sum = highest.float() + total.log()
    expected = torch.mm(logits.copy_(odds), head).float() / total  # Wᵀ p
    # Σ p z is the expected row of the head, times the state
    entropy = log_sum[:, 0] - (expected * states.float()).sum(dim=1)
    return (chosen.float() - log_sum)[:, 0], entropy, is_top1, head[targets].float() - expected
