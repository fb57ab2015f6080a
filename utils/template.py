"""The chat templates, one `register_template(...)` call each.

Everything a format needs is data in that call; `utils/template_format.py` serves them all.
"""

import re
from dataclasses import fields, replace

from utils.errors import UserError, nearest
from utils.template_format import IGNORED, Message, Template, label_spans

__all__ = ["IGNORED", "Message", "Template", "get_template", "label_spans", "register_template", "template_dict"]

template_dict: dict[str, Template] = {}


def register_template(**data) -> Template:
    """Adds a template to the registry; the arguments are `Template`'s attributes."""
    template = Template(**data)
    if template.name in template_dict:
        raise ValueError(f"template {template.name!r} is registered twice")
    template_dict[template.name] = template
    return template


def get_template(name: str, tokenizer=None) -> Template:
    """Looks a template up and fits it to a tokenizer.

    Args:
        name: a name of `template_dict`.
        tokenizer: gives the texts of `{bos}` and `{eos}`; without one they are `<s>` and `</s>`.

    Raises:
        UserError: an unknown name, or a stop token which is not one token of the tokenizer.
    """
    if name not in template_dict:
        raise UserError(unknown_template(name))
    bos, eos = ("<s>", "</s>") if tokenizer is None else (tokenizer.bos_token or "", tokenizer.eos_token or "")
    template = template_dict[name]
    filled = {
        field.name: re.sub(r"\{bos\}", lambda _: bos, value).replace("{eos}", eos)
        for field in fields(template)
        if isinstance(value := getattr(template, field.name), str)
    }
    template = replace(template, **filled)
    if tokenizer is not None:
        _check_stop_token(template, tokenizer)
    return template


def unknown_template(name: str) -> str:
    """The message for a name that is not registered, the nearest ones first."""
    return (
        f"--template_name {name!r} is not a template.{nearest(name, template_dict)} "
        f"Allowed: {', '.join(sorted(template_dict))}"
    )


def _check_stop_token(template: Template, tokenizer) -> None:
    ids = tokenizer(template.stop, add_special_tokens=False)["input_ids"] if template.stop else []
    if len(ids) != 1:
        raise UserError(
            f"template {template.name!r} ends an answer with {template.stop!r}, which is {len(ids)} tokens for the "
            f"tokenizer of {tokenizer.name_or_path!r}; a stop token must be one. Choose a template made for this "
            "model with --template_name ('default' uses the tokenizer's own eos token)"
        )


# ------------------------------------------------------------------------------ the catalogue

register_template(
    name="default",
    source="this project; plain text that any tokenizer with an eos token can hold",
    models=("base models without a chat format of their own",),
    bos="{bos}",
    system="System: {content}\n\n",
    user="User: {content}\n\n",
    # a line feed, not a space: a space would join the answer's first token or stand alone untrained
    assistant="Assistant:\n",
    stop="{eos}",
    after_stop="\n\n",
)

register_template(
    name="qwen",
    source="Qwen/Qwen1.5-7B-Chat, tokenizer_config.json (chat_template), revision of February 2024",
    models=("Qwen1.5",),
    default_system="You are a helpful assistant",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    stop="<|im_end|>",
    after_stop="\n",
)
