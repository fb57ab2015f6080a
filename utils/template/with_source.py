"""A chat template with the settings of one source of rows: a system message, and arguments of the template."""

import json
from dataclasses import dataclass
from typing import Any

from utils.runtime.errors import Problem, UserError
from utils.template.auto import AutoTemplate
from utils.template.messages import Message, RowNote

_PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@dataclass(frozen=True)
class WithSystem:
    """A chat template for preparing rows; conversations without a system message begin with the given one.

    Attributes:
        template: `Template` or `AutoTemplate`, whose methods these are.
        system: the content of the system message.
    """

    template: Any
    system: str

    @property
    def key(self) -> str:
        return f"{self.template.key} system message: {self.system!r}"

    def _complete(self, messages: list[Message]) -> list[Message]:
        if not messages or messages[0]["role"] == "system":
            return messages
        first, *rest = messages
        tools = {"tools": first["tools"]} if "tools" in first else {}  # those of a conversation are at its first turn
        first = {name: value for name, value in first.items() if name != "tools"}
        return [{"role": "system", "content": self.system, **tools}, first, *rest]

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        return self.template.render(self._complete(messages), add_generation_prompt)

    def check(self, messages: list[Message]) -> None:
        self.template.check(self._complete(messages))

    def encode(self, messages: list[Message], tokenizer, **options) -> dict[str, list[int]]:
        return self.template.encode(self._complete(messages), tokenizer, **options)

    def encode_batch(self, conversations: list[list[Message]], tokenizer, *args, **options):
        return self.template.encode_batch([*map(self._complete, conversations)], tokenizer, *args, **options)

    def notes(self, messages: list[Message], train_on: str | int = "all_turns") -> list[RowNote]:
        return self.template.notes(self._complete(messages), train_on)


def with_source_settings(template, source):
    """Returns the template that renders the rows of a source.

    Args:
        template: of the run; None for plain text.
        source: with `name`, `system` and `template_args`, as `utils.data.sources.Source`.

    Raises:
        UserError: the template has no such argument, or refuses a system message.
    """
    if template is None:
        return None
    if source.template_args:
        template = _with_arguments(template, source)
    if not source.system:
        return template
    template = WithSystem(template, source.system)
    try:
        template.check(_PROBE)
    except UserError as error:
        raise _refused(source, f"system cannot be used ({error.sentences()})") from error
    return template


def _with_arguments(template, source) -> AutoTemplate:
    if not isinstance(template, AutoTemplate):
        names = ", ".join(map(repr, source.template_args))
        raise _refused(source, f"template_args gives {names}, and template {template.name!r} takes no arguments")
    arguments = tuple((name, json.dumps(value)) for name, value in source.template_args.items())
    if both := [name for name in source.template_args if name in dict(template.arguments)]:
        raise _refused(source, f"template_args gives {both[0]!r}, which --thinking sets for all rows")
    taken = {name for form in filter(None, (template, template.tool_use)) for name in form.variables()}
    taken -= {"messages", "tools", "add_generation_prompt", *dict(template.tokens)}
    if unknown := [name for name in source.template_args if name not in taken]:
        raise _refused(source, f"template_args gives {unknown[0]!r}, which {template.label} does not take")
    template = template.with_arguments(arguments)
    try:
        template.check(_PROBE)
    except UserError as error:
        raise _refused(source, f"template_args cannot be used ({error.sentences()})") from error
    return template


def _refused(source, message: str) -> UserError:
    text = f"--train_data_path: of the source {source.name!r} {message}; leave it out, or choose another template"
    return UserError(Problem(text, flags=("train_data_path", "template_name")))
