"""Checks and restores an adapter's start: logits equal to the base's, trainable weights in full precision."""

from utils.model.expert_targets import freeze_constants
from utils.model.probe_state import as_for_probing, is_whole
from utils.patches.layers import leave_casts_to_autocast, show_head_bias
from utils.runtime.errors import UserError

# relative to the largest logit; PEFT rounds the scale of Gemma's embedding differently, which makes 2e-4
_TOLERANCE, _TOLERANCE_16_BIT = 1e-3, 0.03


def check_new_adapter(model) -> None:
    """Compares the logits of a short row with the adapter on and off; at the start they must be equal.

    With trained token rows PEFT 0.21 computes embedding and head itself. If a model's embedding does more than look up
    rows, the model would be a different one with the adapter.

    Args:
        model: peft.PeftModel with a new adapter, other than PiSSA's. A model whose weights are sharded over processes
            is not checked.

    Raises:
        UserError: they differ.
    """
    import torch

    if not is_whole(model):
        return
    with torch.no_grad(), torch.random.fork_rng(), as_for_probing(model) as precise:
        model.eval()
        size = model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(1, 17, device=next(model.parameters()).device) * 7 % min(200, size))[None]
        found = model(input_ids=ids, use_cache=False).logits.float()
        with model.disable_adapter():
            expected = model(input_ids=ids, use_cache=False).logits.float()
    difference = float((found - expected).abs().max() / expected.abs().max())
    # DoRA's magnitudes are norms in the precision of the weights, so in float32 they are off by its rounding
    exact = precise and not any("lora_magnitude_vector" in name for name, _ in model.named_parameters())
    if not difference <= (_TOLERANCE if exact else _TOLERANCE_16_BIT):
        raise UserError(
            f"a new adapter changes the logits of {type(model.get_base_model()).__name__} before it is trained (by "
            f"{difference:.2g} of the largest): PEFT computes the embeddings differently from the model if token rows "
            "are trained; use --train_special_tokens off, or --train_mode full"
        )


def adapter_weights(model) -> dict | None:
    """A copy of the trainable weights of an adapter that was loaded, by name; None without one."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def prepare_trainable_weights(model, keep_dtype: bool, start: dict | None) -> None:
    """Restores the precision and the start values of trainable weights, which TRL and PEFT rounded.

    Args:
        model: the trainer's, with an adapter or trained in full.
        keep_dtype: whether the weights must keep their dtype, as for DeepSpeed and FSDP.
        start: the weights of a loaded adapter, from `adapter_weights`; None for a new one.
    """
    show_head_bias(model)
    if hasattr(model, "peft_config"):
        freeze_constants(model)
    leave_casts_to_autocast()
    if not keep_dtype:
        # TRL 1.16 casts the adapters of a quantised base to bf16, and PEFT 0.21 gives trained token rows the base's
        # dtype. An update below 1/256 of a bf16 weight is lost, and fp16's gradient scaling refuses fp16 weights
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    _restore(model, start) if start else _restore_token_rows(model)


def _restore(model, start: dict) -> None:
    """Sets the weights of a loaded adapter, and of its copy that is DPO's reference, to those it was loaded with.

    TRL 1.16 copies the adapter after loading, casts the policy's to bf16, and does not copy trained token rows, as
    it looks for `.default.` in a weight's name and theirs end with `.default`.
    """
    weights = dict(model.named_parameters())
    for name, value in start.items():
        weights[name].data = value.to(weights[name].dtype).clone()
        copy = ".".join("ref" if part == "default" else part for part in name.split("."))
        if copy in weights:
            weights[copy].data = weights[name].data.clone()


def _restore_token_rows(model) -> None:
    """Sets a new adapter's trained token rows to the base's, without the rounding to bf16."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            for name, rows in module.trainable_tokens_delta.items():
                rows.data = module.trainable_tokens_original[name].to(rows.dtype).clone()
