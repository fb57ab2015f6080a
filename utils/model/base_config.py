"""Reading a model's config.json, and the one that a run saves with its weights."""

import contextlib
import copy

from utils.runtime.errors import UserError, load_failure


def load_config(path: str, trust_remote_code: bool = False, flag: str = "--model_name_or_path"):
    """Reads a model's configuration, and no weights.

    Args:
        path: a folder, or a hub's name.
        trust_remote_code: whether Python code beside the model may run.
        flag: the flag it came by, for the message.

    Returns:
        transformers.PretrainedConfig

    Raises:
        UserError: there is none, or it is of no model known here.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub, and each model's code, raise their own
        raise UserError(load_failure("config.json", flag, path, error)) from error


def text_configs(model) -> list:
    """The configurations that a model's layers read: the model's own, and that of the language model inside it."""
    config = model.config
    return list({id(part): part for part in (config, config.get_text_config())}.values())


def refuse_unloadable(path: str, flag: str, trust_remote_code: bool, remedy: str) -> None:
    """Refuses a model of which `AutoModelForCausalLM` loads only the language model, and could not load it once saved.

    Of Llama 3.2 Vision transformers 5.23 loads `MllamaForCausalLM`; saved alone, its config.json has a model type for
    which no auto class has a model.

    Args:
        path: of the full model, a folder or a name on the Hub.
        flag: the flag that named it.
        trust_remote_code: whether Python code that comes with the model may run.
        remedy: the end of the message.

    Raises:
        UserError: it could not be loaded again, or the configuration cannot be read.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = load_config(path, trust_remote_code, flag)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name is None or hasattr(config, "auto_map"):  # code beside the model
        return
    if getattr(transformers, name).config_class.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"of {flag} {path!r} only the language model within, {name}, would be saved, which transformers' "
            f"AutoModelForCausalLM cannot load again; {remedy}"
        )


@contextlib.contextmanager
def saved_with(model, base_config):
    """Lets `save_pretrained` write the base's configuration instead of the one that was changed for the training.

    TRL 1.16 and transformers 5.23 set fields that concern only the training: `use_cache`, `output_router_logits`,
    `router_aux_loss_coef`, `pad_token_id`. Of the changes only the stop token is kept; `save_pretrained` itself writes
    the dtype of the weights.

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
