"""A base's own generation_config while this project generates: its stop tokens count, and nothing else of it."""

import contextlib
import functools

from loguru import logger

_KEPT = ("eos_token_id", "pad_token_id", "bos_token_id")


@contextlib.contextmanager
def own_generation(model):
    """Lets `generate` see of the model's generation_config only its special tokens.

    transformers takes every other field of it for a default: `num_return_sequences`, `stop_strings` or a forced token
    as much as a temperature. The flags decide how tokens are chosen, so all of them are set aside alike.

    Args:
        model: transformers.PreTrainedModel, or peft.PeftModel around it; it has its own configuration back afterwards.
    """
    from peft import PeftModel
    from transformers import GenerationConfig

    base = model.generation_config
    if given := set_aside(base):
        _tell(", ".join(f"{name} {value!r}" for name, value in given.items()))
    models = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    ours = GenerationConfig(**{name: getattr(base, name) for name in _KEPT})
    try:
        for part in models:
            part.generation_config = ours
        yield
    finally:
        for part in models:
            part.generation_config = base


def set_aside(config) -> dict:
    """The fields of a generation_config that would change answers or their form, by name.

    Args:
        config: transformers.GenerationConfig.
    """
    neutral = config._get_default_generation_params()
    given = config.to_diff_dict()
    technical = {*_KEPT, "_from_model_config", "transformers_version", "use_cache", "cache_implementation"}
    return {
        name: value
        for name, value in sorted(given.items())
        if name not in technical and value not in (None, False) and value != neutral.get(name)
    }


@functools.cache
def _tell(fields: str) -> None:
    """Once for each set of fields."""
    logger.info("of the model's generation_config only the stop tokens are used here, not {}: the flags decide", fields)
