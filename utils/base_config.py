"""The config.json of a run's weights: the base's own, but for what was trained."""

import contextlib
import copy


def text_configs(model) -> list:
    """The configurations of a model that its layers read: the whole one, and the language model's inside it."""
    config = model.config
    return list({id(part): part for part in (config, config.get_text_config())}.values())


@contextlib.contextmanager
def saved_with(model, base_config):
    """Lets `save_pretrained` write the base's configuration in place of the one that the training worked with.

    TRL and transformers set fields that are about the training alone: `use_cache`, `output_router_logits`,
    `router_aux_loss_coef`, `pad_token_id`. Only the stop token is trained, and `save_pretrained` itself writes the
    type of the weights.

    Args:
        model: the one that is saved; an adapter, which is saved without config.json, is left alone.
        base_config: a copy of its configuration from before the trainer was built, or None.
    """
    if base_config is None or hasattr(model, "peft_config"):
        yield
        return
    worked_with = model.config
    saved = copy.deepcopy(base_config)
    saved.get_text_config().eos_token_id = worked_with.get_text_config().eos_token_id
    model.config = saved
    try:
        yield
    finally:
        model.config = worked_with
