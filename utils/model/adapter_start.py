"""Whether a new adapter leaves its model as it was: what PEFT's wrappers leave out shows before anything is trained."""

from utils.model.probe_state import as_for_probing, is_whole
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
