"""How an adapter starts: its weights in full precision, and logits equal to those of the base."""

from utils.model.probe_state import as_for_probing, is_whole
from utils.patches.layers import leave_casts_to_autocast, show_head_bias
from utils.runtime.errors import UserError

# relative to the largest logit; PEFT rounds the scale of Gemma's embedding otherwise, which is 2e-4
_TOLERANCE, _TOLERANCE_16_BIT = 1e-3, 0.03


def check_new_adapter(model) -> None:
    """Compares the logits of a short row with the adapter on and off, which at its start must be the same.

    PEFT computes the embedding or the head by itself where rows of them are trained. A model whose embedding does more
    than to look rows up would be another model under the adapter.

    Args:
        model: peft.PeftModel with a new adapter, other than PiSSA's. Weights that are split over processes are not
            looked at.

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
            f"{difference:.2g} of the largest): PEFT computes the embeddings otherwise than the model where it trains "
            "rows of them; use --train_special_tokens off, or --train_mode full"
        )


def adapter_weights(model) -> dict | None:
    """The weights of an adapter that is on the model already, by name; None where there is none."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def settle_trainable(model, one_type: bool, start: dict | None) -> None:
    """Undoes what on the way into TRL's trainer would cost exactness.

    Args:
        model: the trainer's, wrapped by PEFT or whole.
        one_type: whether the weights must keep the type they have.
        start: the weights the adapter came with, from `adapter_weights`.
    """
    show_head_bias(model)
    leave_casts_to_autocast()
    if not one_type:
        # TRL rounds QLoRA's adapters to bf16, and PEFT gives trained token rows the base's type. An update
        # below 1/256 of a bf16 weight is lost, and fp16's gradient scaling refuses fp16 weights
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    _restore(model, start) if start else _restore_token_rows(model)


def _restore(model, start: dict) -> None:
    """Gives the adapter, and the copy of it that is DPO's reference, the weights they came with.

    TRL copies them before it rounds the policy's to bf16, and leaves out trained token rows,
    whose names end where it looks for more.
    """
    weights = dict(model.named_parameters())
    for name, value in start.items():
        weights[name].data = value.to(weights[name].dtype).clone()
        copy = ".".join("ref" if part == "default" else part for part in name.split("."))
        if copy in weights:
            weights[copy].data = weights[name].data.clone()


def _restore_token_rows(model) -> None:
    """A new adapter's trained token rows begin as the base's, not as those rounded to bf16."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            for name, rows in module.trainable_tokens_delta.items():
                rows.data = module.trainable_tokens_original[name].to(rows.dtype).clone()
