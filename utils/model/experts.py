"""Checks that the load-balancing loss of a mixture of experts can be computed, before it is trained."""

from loguru import logger

from utils.model.base_config import text_configs
from utils.runtime.errors import UserError, first_line

_ROWS, _TOKENS = 2, 8  # of the test's forward pass
_TOLERANCE = 0.02  # relative difference between TRL's and the model's loss, also in bf16


def leave_router_logits_out(*models) -> None:
    """Sets `output_router_logits` to false, so that a forward pass returns router logits only on request.

    TRL 1.16 requests them in each training step. With them transformers 5.23's `generate` fails for several prompts.

    Args:
        *models: models; None is skipped.
    """
    for model in filter(None, models):
        for config in text_configs(model):
            if getattr(config, "output_router_logits", False):
                config.output_router_logits = False


def resolve_aux_loss(trainer) -> None:
    """Disables the auxiliary loss if trainer and model compute different values, or cannot compute it.

    Args:
        trainer: TRL's SFTTrainer or DPOTrainer, built.

    Raises:
        UserError: `--router_aux_loss_coef` is given for a model that cannot compute the loss.
    """
    leave_router_logits_out(trainer.model)
    if not getattr(trainer, "aux_loss_enabled", False):
        return
    config = trainer.model.config.get_text_config()
    inner = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    for name in ("num_experts", "num_experts_per_tok"):
        # TRL 1.16's head reads them from the configuration, where some families have other names
        if getattr(config, name, None) is None and getattr(inner, name, None) is not None:
            setattr(config, name, getattr(inner, name))
    reason = _why_disabled(trainer, config)
    if reason is None:
        return
    if trainer.args.router_aux_loss_coef:
        raise UserError(
            f"--router_aux_loss_coef {trainer.args.router_aux_loss_coef:g} cannot be used with {type(inner).__name__}: "
            f"{reason}; leave the flag out to train without the experts' auxiliary loss"
        )
    trainer.aux_loss_enabled = False
    logger.warning("the experts' auxiliary loss is not trained: {}", reason)


def _why_disabled(trainer, config) -> str | None:
    """Why the auxiliary loss cannot be trained; None if it can."""
    from trl import SFTTrainer

    fused = not getattr(trainer, "own_forward", False)
    if isinstance(trainer, SFTTrainer) and trainer.label_smoother is not None:
        return "TRL leaves it out with --label_smoothing_factor"
    if fused and None in (getattr(config, name, None) for name in ("num_experts", "num_experts_per_tok")):
        return "the model's configuration does not name its number of experts"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return None  # the weights may be sharded, so no forward pass is possible yet
    own, reason = _compute(trainer)
    if own is None or not fused:
        return reason
    found, reason = _compute(trainer, fused_lm_head=True)
    if found is not None and abs(found - own) > _TOLERANCE * abs(own):
        return f"TRL computes {found:.4g} where the model itself computes {own:.4g}"
    return reason


def _compute(trainer, **options) -> tuple[float | None, str | None]:
    """The auxiliary loss of a few tokens, or why it cannot be computed."""
    import math

    import torch

    model = trainer.model
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(_ROWS * _TOKENS, device=model.device).reshape(_ROWS, _TOKENS) % vocabulary
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            options |= {"labels": ids} if options else {}
            output = model(input_ids=ids, use_cache=False, output_router_logits=True, **options)
        loss = float(output.aux_loss)
    except Exception as error:  # each model's code raises its own
        return None, f"the model's forward pass cannot compute it ({first_line(error)})"
    finally:
        model.train(training)
    return (loss, None) if math.isfinite(loss) else (None, f"it is {loss}")
