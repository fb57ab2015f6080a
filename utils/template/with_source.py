"""A chat template with the settings of one source of rows: a system message, and arguments of the template."""

import dataclasses
import json

from utils.runtime.errors import Problem, UserError
from utils.template.auto import AutoTemplate


def with_source_settings(template, source):
    """Returns the template that renders the rows of a source.

    Args:
        template: of the run; None for plain text.
        source: with `name`, `system` and `template_args`, as `utils.data.sources.Source`.

    Raises:
        UserError: the template has no such argument, or no turn for a system message.
    """
    if template is None or not (source.system or source.template_args):
        return template
    if isinstance(template, AutoTemplate):
        return _auto(template, source)
    if source.template_args:
        names = ", ".join(map(repr, source.template_args))
        raise _refused(source, f"template_args gives {names}, and template {template.name!r} takes no arguments")
    if template.system is None:
        raise _refused(source, f"system is given, and template {template.name!r} has no turn for a system message")
    return dataclasses.replace(template, default_system=source.system)


def _auto(template: AutoTemplate, source) -> AutoTemplate:
    arguments = tuple((name, json.dumps(value)) for name, value in source.template_args.items())
    taken = {name for form in filter(None, (template, template.tool_use)) for name in form.variables()}
    reserved = {"messages", "tools", "add_generation_prompt", *dict(template.tokens)}
    if unknown := [name for name in source.template_args if name not in taken - reserved]:
        raise _refused(source, f"template_args gives {unknown[0]!r}, which {template.label} does not take")
    new = template.with_settings(arguments, source.system or "")
    new.check([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    return new


def _refused(source, message: str) -> UserError:
    text = f"--train_data_path: of the source {source.name!r} {message}; leave it out, or choose another template"
    return UserError(Problem(text, flags=("train_data_path", "template_name")))
