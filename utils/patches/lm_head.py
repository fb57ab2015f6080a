"""Computes the language-model head's loss on labelled positions only, without keeping all logits in memory.

TRL 1.16 does so with Triton. Without it, TRL scores every position, prompts and padding too, and computes each tile of
logits again in the backward pass.
"""

import functools
from types import SimpleNamespace

TILE = 8_000_000  # logits computed at once; about 50 MB with the intermediate results


def use_trained_positions() -> None:
    """Makes TRL's fused head score only labelled positions on the CPU too, and frozen heads in one pass."""
    import trl.trainer.utils as of_trl

    if not isinstance(of_trl._ChunkedLogProbFunction, SimpleNamespace):
        scored = of_trl._ChunkedLogProbFunction.apply
        of_trl._ChunkedLogProbFunction = SimpleNamespace(apply=lambda *given: _apply(scored, *given))
        # here it only decides whether unlabelled positions are left out; the kernels import the original
        of_trl._use_triton = lambda device: device.type != "xla"


def _apply(scored, hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
    """Scores a frozen head by `frozen_head`, any other by TRL's function.

    Args:
        scored: TRL's `ChunkedLogProbFunction.apply`; the other arguments are its own.
    """
    import torch

    plain = bias is None and not weight.requires_grad and (temperature, softcap, scale) == (1.0, None, 1.0)
    supported = set(outputs) <= {"log_probs", "entropy", "is_top1"}  # DPO needs more
    compiling = torch.compiler.is_compiling()  # torch.compile refuses the in-place operations here
    if not plain or not supported or compiling or hidden.device.type != "cpu" or not len(hidden):
        return scored(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs)
    log_probs, entropy, is_top1 = frozen_head(hidden, weight, targets)
    return log_probs, entropy, None, None, is_top1


def frozen_head(hidden, weight, targets):
    """Computes the log-probabilities of `targets` under a head that is not trained.

    With z = W h and p = softmax(z), log p_y = z_y - log Σ exp(z), whose gradient in h is W_y - Wᵀ p. The forward pass
    computes it from the logits, so the backward pass computes nothing again.

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
    """Returns the autograd function, defined at the first call so that importing this module needs no torch."""
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
    """Scores one tile of positions, in float32 from the logits on, as the loss of transformers does.

    Args:
        states, targets, head: as in `frozen_head`, of n positions.
        logits, odds: buffers to write into, [n, V].
    """
    import torch

    torch.mm(states, head.T, out=logits)
    highest = logits.amax(dim=1, keepdim=True)
    chosen = logits.gather(1, targets[:, None])
    is_top1 = (chosen == highest)[:, 0]
    # argmax takes the first of equal logits
    is_top1[is_top1.clone()] = logits[is_top1].argmax(dim=1) == targets[is_top1]
    odds.copy_(logits).sub_(highest).exp_()  # p times their sum, at most 1
    total = odds.sum(dim=1, keepdim=True)
    log_sum = highest.float() + total.log()
    expected = torch.mm(logits.copy_(odds), head).float() / total  # Wᵀ p
    # Σ p z is the expected row of the head, times the state
    entropy = log_sum[:, 0] - (expected * states.float()).sum(dim=1)
    return (chosen.float() - log_sum)[:, 0], entropy, is_top1, head[targets].float() - expected
