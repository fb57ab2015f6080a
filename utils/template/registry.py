"""Registers chat templates, and looks them up by name."""

import re
from dataclasses import fields, replace
from datetime import datetime

from utils.runtime.errors import Problem, UserError, nearest
from utils.template.auto import AutoTemplate
from utils.template.dates import today
from utils.template.format import Template, formats_with_tools
from utils.template.jinja_template import JinjaTemplate
from utils.template.thinking import with_thinking

template_dict: dict[str, Template] = {}


def register_template(**data) -> Template:
    """Adds a template to `template_dict`.

    The arguments are the attributes of `Template`, or of `JinjaTemplate` for a format with `jinja`.
    """
    template = JinjaTemplate(**data) if "jinja" in data else Template(**data)
    if template.name in template_dict:
        raise ValueError(f"template {template.name!r} is registered twice")
    template_dict[template.name] = template
    if template.has_tools:
        formats_with_tools.append(template.name)
    return template


def get_template(name: str, tokenizer=None, date: str | None = None, thinking: str = "auto") -> Template | AutoTemplate:
    """Looks up a template and fills in the tokenizer's BOS and EOS tokens.

    Args:
        name: a key of `template_dict`, or `auto` for the tokenizer's own chat template.
        tokenizer: has the texts for `{bos}` and `{eos}`; without one they are `<s>` and `</s>`.
        date: the day that the template shows, if it shows one; None for today.
        thinking: `--thinking`.

    Raises:
        UserError: the name is unknown, the stop token is not a single token of the tokenizer, or the template has no
            switch for thinking.
    """
    if name == "auto":
        return with_thinking(AutoTemplate.of(tokenizer, date), thinking)
    if name not in template_dict:
        raise UserError(unknown_template(name))
    bos, eos = ("<s>", "</s>") if tokenizer is None else (tokenizer.bos_token or "", tokenizer.eos_token or "")
    template = template_dict[name]
    date = (date or today()) if template.shows_date else ""
    day = datetime.fromisoformat(date) if date else None
    filled = {
        field.name: re.sub(r"\{date:([^}]+)\}", lambda form: day.strftime(form[1]), value)
        .replace("{bos}", bos)
        .replace("{eos}", eos)
        for field in fields(template)
        if isinstance(value := getattr(template, field.name), str)
    }
    if date:
        filled["date"] = date
    template = with_thinking(replace(template, **filled), thinking)
    if tokenizer is not None:
        _check_stop_token(template, tokenizer)
    return template


def get_run_template(args, tokenizer) -> Template | AutoTemplate:
    """Looks up the template of a run; `args` is CommonArgs."""
    return get_template(args.template_name, tokenizer, args.template_date, args.thinking)


def unknown_template(name: str, flag: str = "template_name") -> Problem:
    """Describes an unknown name, with the names most like it."""
    return Problem(
        f"--{flag} {name!r} is not a template.{nearest(name, template_dict)} "
        f"Allowed: auto, {', '.join(sorted(template_dict))}",
        flags=(flag,),
    )


def _check_stop_token(template: Template, tokenizer) -> None:
    stop = template.stop_token()
    # after another character: an entry of the vocabulary may have this text and yet never be produced
    ids = tokenizer(f"a{stop}", add_special_tokens=False)["input_ids"]
    vocabulary = tokenizer.get_vocab()
    if not stop or stop not in vocabulary or ids[-1:] != [vocabulary[stop]]:
        message = (
            f"template {template.name!r} ends an answer with {stop!r}, which must be one token, and the tokenizer of "
            f"{tokenizer.name_or_path!r} has no such token. Choose a template made for this model with --template_name "
            "('auto' uses the tokenizer's own, 'default' ends with its EOS token)"
        )
        raise UserError(Problem(message, code="TEMPLATE_TOKEN_SPLIT", flags=("template_name",)))
