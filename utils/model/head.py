"""Checks that TRL's fused head gives a model's own log-probabilities, and replaces it if it does not."""

import functools
import inspect
import math
import types

from loguru import logger

from utils.runtime.errors import UserError
from utils.template.tokenize import IGNORE_INDEX


def keep_logits(model, places) -> dict:
    """Returns `{"logits_to_keep": places}` if the model's forward takes it, else an empty dict.

    Args:
        model: transformers' or PEFT's model, or one wrapped by DDP or DeepSpeed.
        places: the positions whose logits are needed, [P].
    """
    base = getattr(model, "module", model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    parameters = inspect.signature(type(base).forward).parameters
    return {"logits_to_keep": places} if "logits_to_keep" in parameters else {}


# ------------------------------------------------------------------------------ models whose head is not one matrix
def check_head(model) -> None:
    """Lets a model use its own logits for the loss if TRL's fused head computes different ones.

    TRL 1.16 multiplies the last hidden states by `lm_head.weight`, and applies the scale or soft cap that some
    configurations name. A model that computes its logits in another way (layers inside the head, a cap with another
    name) would be trained with a wrong loss.

    Args:
        model: after `trl.trainer.utils.add_fused_lm_head`, with or without PEFT's wrapper. With ZeRO-3 and FSDP a small
            random model of the same configuration is checked instead.

    Raises:
        UserError: the log-probabilities still differ.
    """
    from utils.model.probe_state import is_whole
    from utils.model.small import small_model

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    probed = base if is_whole(base) else _small_fused(small_model(base.config))
    if probed is None or (difference := head_difference(probed)) is None:
        return
    logger.warning(
        "the loss is computed from the model's own logits, which takes more memory: TRL's fused head gives other "
        "log-probabilities for {} (by {:.2g})",
        type(base).__name__,
        difference,
    )
    for part in {base, probed}:
        use_model_logits(part)
    if (difference := head_difference(probed)) is not None:
        raise UserError(
            f"the log-probabilities that {type(base).__name__} is trained on differ from those of its logits by "
            f"{difference:.2g}; choose another --model_name_or_path"
        )


def _small_fused(model):
    from trl.trainer.utils import add_fused_lm_head

    if model is not None:
        add_fused_lm_head(model, outputs=("log_probs",))
    return model


def head_difference(model) -> float | None:
    """The largest difference of the fused head's log-probabilities of a row from the logits'; None within rounding."""
    import torch

    from utils.model.probe_state import as_for_probing

    with torch.no_grad(), torch.random.fork_rng(), as_for_probing(model) as precise:
        model.eval()  # a router that draws random numbers would differ from call to call
        device = next(model.parameters()).device
        ids = (torch.arange(1, 25, device=device) * 7 % min(200, model.get_input_embeddings().weight.shape[0]))[None]
        logits = [model(input_ids=row, use_cache=False).logits[0, :11].float() for row in (ids, ids[:, :12])]
        # computed for two lengths, whose difference is the rounding to expect
        expected, shorter = (rows.log_softmax(-1).gather(1, ids[0, 1:12, None])[:, 0] for rows in logits)
        try:
            found = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs[0, :11].float()
        except Exception as error:  # TRL expects another form of backbone
            logger.debug("TRL's fused head fails: {!r}", error)
            return math.inf
    difference = float((found - expected).abs().max())
    tolerance = max(1e-4 if precise else 0.05, 4 * float((shorter - expected).abs().max()))
    return None if difference <= tolerance else difference


def use_model_logits(model) -> None:
    """Replaces TRL's fused head by the model's own forward pass, with the same output.

    The logits of all labelled positions, [N, V], are in memory at once.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    plain = type(model).forward

    @functools.wraps(plain)
    def forward(self, *args, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            if labels is not None:
                kwargs["labels"] = labels
            return plain(self, *args, **kwargs)
        output = plain(self, *args, **kwargs | {"use_cache": False})
        targets = labels[:, 1:].to(output.logits.device)
        mask = targets != IGNORE_INDEX
        scored = output.logits[:, :-1][mask].float()
        log_probs = scored.log_softmax(dim=-1)
        parts = {
            "log_probs": log_probs.gather(1, targets[mask][:, None])[:, 0],
            "entropy": -(log_probs.detach().exp() * log_probs.detach()).sum(dim=-1),
            "is_top1": scored.argmax(dim=-1) == targets[mask],
        }
        # masked_scatter gives a step without labels a gradient too, which is zero
        parts = {name: part.new_zeros(mask.shape).masked_scatter(mask, part) for name, part in parts.items()}
        loss = -parts["log_probs"].sum() / (
            mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        )
        aux_loss = getattr(output, "aux_loss", None)
        if aux_loss is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **parts)

    model.forward = types.MethodType(forward, model)
