"""Runs a model on fake tensors, which have shape and dtype but no data, as it would run on a GPU or the CPU."""

import functools
from dataclasses import dataclass
from unittest.mock import patch

from utils.model.meta import is_quantised


@dataclass(frozen=True)
class Batch:
    """The rows of one forward pass on one GPU.

    Attributes:
        rows: how many; a preference pair is two.
        tokens: the length of each row.
        trained: share of the tokens that have a label.
        end_to_end: whether the rows are concatenated without padding, [1, rows · tokens], else [rows, tokens].
        on_gpu: assume a GPU's kernels; on the CPU attention and head differ.
        whole_logits: whether logits of all positions exist at once in float32, as in programs without a fused head.
    """

    rows: int
    tokens: int
    trained: float = 1.0
    end_to_end: bool = True
    on_gpu: bool = True
    whole_logits: bool = False

    def __str__(self) -> str:
        return f"{self.rows} {'row' if self.rows == 1 else 'rows'} of {self.tokens:,} tokens"

    @property
    def labelled(self) -> int:
        """How many positions are trained; the first token of a row is never predicted."""
        return max(1, int(self.trained * self.rows * (self.tokens - 1)))


def make_fake(model) -> None:
    """Replaces every weight and buffer of a meta model by a fake tensor; called before counting begins."""
    import torch

    made: dict = {}

    def fake(tensor, dtype):
        if tensor is None or id(tensor) in made:
            return made.get(id(tensor))
        new = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
        if isinstance(tensor, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
        made[id(tensor)] = new
        return new

    for module in list(model.modules()):
        in_4_bits = any(is_quantised(weight) for weight in module._parameters.values())
        if in_4_bits:
            module.forward = functools.partial(_quantised_forward, module)
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                kind[name] = fake(tensor, module.compute_dtype if in_4_bits else None)


def _quantised_forward(module, states):
    """The forward pass of a 4-bit layer: its weight is dequantised for each product and freed."""
    result = _unpacking().apply(states.to(module.compute_dtype), module.weight)
    return (result if module.bias is None else result + module.bias).to(states.dtype)


@functools.cache
def _unpacking():
    import torch

    class Unpacking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states, weight):
            ctx.save_for_backward(weight)
            return states @ weight.clone().T

        @staticmethod
        def backward(ctx, gradient):
            (weight,) = ctx.saved_tensors
            return gradient @ weight.clone(), None

    return Unpacking


def inputs_of(batch: Batch) -> dict:
    """The model's inputs: token ids, and position ids if the rows are concatenated."""
    import torch

    shape = (1, batch.rows * batch.tokens) if batch.end_to_end else (batch.rows, batch.tokens)
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    if batch.end_to_end:
        inputs["position_ids"] = torch.zeros(shape, dtype=torch.long)
    return inputs


def mask_of(batch: Batch):
    """The mask, [1, 1, tokens, tokens], that separates concatenated rows; None for other batches."""
    import torch

    if not batch.end_to_end or batch.rows == 1:
        return None
    length = batch.rows * batch.tokens
    mask = torch.empty(1, 1, length, length, dtype=torch.bool)
    # utils.patches.attention reads the rows from this attribute
    mask.row_blocks = [(start, start + batch.tokens, None) for start in range(0, length, batch.tokens)]
    return mask


def changes(batch: Batch, dtype):
    """Yields the patches for a run on fake tensors: no operation may read values, and GPU kernels are imitated.

    The names are those of transformers 5.23 and TRL 1.16.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from utils.patches.attention import GPU_BLOCKS_FROM

    def attend(module, query, key, value, mask, **kwargs):
        import torch

        blocks = getattr(mask, "row_blocks", [])
        if len(blocks) < 2 or (batch.on_gpu and batch.tokens < GPU_BLOCKS_FROM):
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        before = query.dtype
        if not batch.on_gpu:  # as utils.patches.attention does on the CPU
            query, key, value = query.float(), key.float(), value.float()
        rows = [[states[:, :, start:end] for states in (query, key, value)] for start, end, _ in blocks]
        outputs = [sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows]
        return torch.cat(outputs, dim=1).to(before), None

    def nothing(*_, **__):
        return None

    yield patch.dict(AttentionInterface._global_mapping, {"sdpa": attend})
    # it reads the values of `position_ids`; on fake tensors it would take one row for several, which need a mask
    yield patch("transformers.masking_utils.find_packed_sequence_indices", nothing)
    # torch's grouped_mm, one product for all experts, has fake shapes for bf16 only; its fallback for every dtype
    yield patch("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)
    if batch.on_gpu:  # there TRL computes each tile of the logits in place, in a Triton kernel
        yield patch("trl.kernels.chunked_logprob._forward_tile", nothing)
        yield patch("trl.kernels.chunked_logprob._backward_tile", nothing)
        yield patch("trl.kernels.chunked_logprob._addmm_fp32", nothing)


def loss_of(task, model, hidden, batch: Batch):
    """Computes head and loss as the task does, on the trained positions only."""
    import torch

    head = model.get_output_embeddings()
    states = hidden.reshape(-1, hidden.shape[-1])
    if batch.whole_logits:
        # transformers' own loss: shifted and copied, the softmax kept for the backward pass
        logits = head(states).float()
        targets = torch.empty(len(logits) - 1, dtype=torch.long)
        loss = torch.nn.functional.cross_entropy(logits[:-1].contiguous(), targets)
        loss.logits = logits  # kept alive, as the model's output keeps them
        return loss
    states = states[torch.empty(batch.labelled, dtype=torch.long)]  # a copy, as selecting with a mask makes
    targets = torch.empty(batch.labelled, dtype=torch.long)
    if task.memory_loss is not None:
        return task.memory_loss(model, states, targets, batch)
    return torch.nn.functional.cross_entropy(head(states).float(), targets, reduction="none").sum()


# ------------------------------------------------------------------ for `Task.memory_loss`
def frozen_head_loss(model, states, targets):
    """The loss of `utils.patches.lm_head`, for a head that is not trained.

    Args:
        model: on fake tensors.
        states: hidden states of the labelled positions, [positions, width].
        targets: [positions].
    """
    from utils.patches import lm_head

    with patch.object(lm_head, "_score", _score_shapes):
        return lm_head.frozen_head(states, model.get_output_embeddings().weight, targets)[0].sum()


def chunked_loss(model, states, targets):
    """TRL's loss in chunks of the vocabulary; arguments as for `frozen_head_loss`."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    head = model.get_output_embeddings()
    outputs = ("log_probs", "entropy", "is_top1")
    weight, bias = head.weight, getattr(head, "bias", None)
    given = (states, weight, bias, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs)
    return ChunkedLogProbFunction.apply(*given)[0].sum()


def _score_shapes(states, targets, head, logits, odds):
    """`utils.patches.lm_head._score` without the step that reads values."""
    import torch

    torch.mm(states, head.T, out=logits)
    odds.copy_(logits)
    total = odds.sum(dim=1, keepdim=True)
    expected = torch.mm(logits.copy_(odds), head).float() / total
    entropy = (expected * states.float()).sum(dim=1)
    return total[:, 0], entropy, total[:, 0] > 0, head[targets].float() - expected
