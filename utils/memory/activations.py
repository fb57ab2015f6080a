"""Measures the memory of a training step besides weights and optimizer, by running it on tensors without data.

The model's own code runs forward and backward on PyTorch's fake tensors, so that a 7B model takes seconds. Every
storage is counted from its allocation until it is freed.
"""

import contextlib
import copy
import functools
from dataclasses import dataclass

from utils.memory.fake import Batch, changes, inputs_of, loss_of, make_fake, mask_of
from utils.memory.live import LiveBytes
from utils.model.adapter import adapter_of
from utils.model.options import compute_dtype

# deeper models are extrapolated from two shallow ones, as each further layer adds the same
SHALLOW, LESS_SHALLOW = 2, 4


@dataclass(frozen=True)
class Activations:
    """Bytes of a step at its peak, without the gradients of weights.

    Attributes:
        saved: saved for the backward pass when the last layer has been computed.
        logits: needed by the language-model head on top of `saved`.
        temporary: needed on top of `saved` elsewhere, such as in a layer's backward pass, beyond `logits`.
        early, late: the peaks with the gradients of weights, until the last layer has its gradients and after that.
            Each grows linearly with the number of layers, which their maximum does not.
    """

    saved: int
    logits: int
    temporary: int
    early: int
    late: int

    @property
    def peak(self) -> int:
        return self.saved + self.logits + self.temporary


def step_bytes(args, train_args, build, config, batch: Batch, laid_out: bool, checkpointing: bool) -> Activations:
    """Measures a step: of the full model, or extrapolated from two shallow ones if it is deep.

    Args:
        args, train_args: as parsed.
        build: config → the meta model.
        config: the model's.
        batch: the rows.
        laid_out: whether DeepSpeed is used, which computes without autocast.
        checkpointing: whether each layer is recomputed in the backward pass.
    """
    depth = config.get_text_config().num_hidden_layers
    run = functools.partial(_run, args, train_args, batch=batch, laid_out=laid_out, checkpointing=checkpointing)
    if depth <= LESS_SHALLOW:
        return run(build(config))
    few, more = (run(build(of_depth(config, layers))) for layers in (SHALLOW, LESS_SHALLOW))
    saved, peak, early, late = (
        _extrapolate(getattr(few, name), getattr(more, name), depth) for name in ("saved", "peak", "early", "late")
    )
    return Activations(saved, more.logits, max(0, peak - saved - more.logits), early, late)


def _extrapolate(few: int, more: int, depth: int) -> int:
    return more + (more - few) * (depth - LESS_SHALLOW) // (LESS_SHALLOW - SHALLOW)


def of_depth(config, layers: int):
    """The configuration with fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _run(args, train_args, model, batch: Batch, laid_out: bool, checkpointing: bool) -> Activations:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtype = compute_dtype(args)
    autocast = torch.autocast("cpu", dtype, enabled=not laid_out and dtype != torch.float32)
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        for change in changes(batch, dtype):
            stack.enter_context(change)
        make_fake(model)
        live = LiveBytes(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=train_args.gradient_checkpointing_kwargs)
            if adapter_of(args).is_adapter:
                model.enable_input_require_grads()
        _watch_gradients(model, live)
        inputs = inputs_of(batch)
        stack.enter_context(live.mode)
        with autocast:
            mask = mask_of(batch)  # counted too: a step makes its own
            inner = model.get_base_model() if hasattr(model, "peft_config") else model
            hidden = inner.base_model(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
            saved, forward_peak = live.now, live.peak
            live.restart_peaks()
            loss = loss_of(args.task, inner, hidden, batch)
        del hidden
        head_peak = live.peak
        loss.backward()
    peak = max(forward_peak, head_peak, live.peak)
    logits = max(0, head_peak - saved)
    return Activations(saved, logits, max(0, peak - saved - logits), max(live.early, forward_peak), live.late)


def _watch_gradients(model, live: LiveBytes) -> None:
    """Counts weight gradients separately, and notes when the last layer has its own."""
    import torch

    depth = model.config.get_text_config().num_hidden_layers
    stacks = [found for found in model.modules() if isinstance(found, torch.nn.ModuleList) and len(found) == depth]
    before_last = {id(weight) for stack in stacks[:1] for layer in stack[:-1] for weight in layer.parameters()}

    def note(weight):
        live.is_late = live.is_late or id(weight) in before_last
        live.is_gradient(weight.grad)

    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(note)
