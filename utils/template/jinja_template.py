"""`JinjaTemplate`: a chat format whose conversations with tools are rendered by a Jinja text of this project.

The texts are in `utils/template/formats/`. The answers are marked in them with `{% generation %}`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from utils.runtime.errors import UserError
from utils.template.auto import AutoTemplate, with_defaults
from utils.template.format import Template
from utils.template.jinja import quoted
from utils.template.messages import Message, RowNote
from utils.template.tokenize import Segment

_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


@dataclass(frozen=True)
class JinjaTemplate(Template):
    """A chat format with tools.

    Attributes:
        jinja: the Jinja text of the format, which renders all conversations; also saved as `tokenizer.chat_template`.
            Those without tools are rendered by `Template`, to the same text, since that is several times faster.
        settings: name → expression of the variables that are set before `jinja`, by which formats share a text.
        jinja_system: whether conversations with a system message are rendered by `jinja`.
        jinja_only: whether those are rendered by `jinja` as well, since the other attributes cannot describe them.
        exact_marks: whether the marks in `jinja` enclose answers as the model gives them; false where a rendering shows
            another prompt before an earlier answer than the model had.
        call_stop: the token that ends a turn with a tool call, if that is another one than `stop`.
        date: the day that the format shows, `2026-01-31`, if it shows one; empty for today.
        arguments: name → value as JSON of arguments of `jinja`, with which it renders all conversations.
    """

    jinja: str = ""
    settings: tuple[tuple[str, str], ...] = ()
    jinja_system: bool = False
    exact_marks: bool = True
    jinja_only: bool = False
    call_stop: str = ""
    date: str = ""
    arguments: tuple[tuple[str, str], ...] = ()

    @property
    def has_tools(self) -> bool:
        """Whether the format has tool calls."""
        return "tools" in _COMMENT.sub("", self.jinja)

    def with_arguments(self, arguments: tuple[tuple[str, str], ...]) -> "JinjaTemplate":
        """Returns the format with further arguments of its Jinja text."""
        return replace(self, arguments=tuple((dict(self.arguments) | dict(arguments)).items()))

    @cached_property
    def _form(self) -> AutoTemplate:
        """The Jinja text with the interface of `Template`."""
        special = re.compile(re.escape(self.stop_token()))
        form = AutoTemplate(self._jinja(), (), special, self.date, self.name, self.exact_marks)
        return replace(form, arguments=self.arguments)

    @cached_property
    def _training_form(self) -> AutoTemplate:
        """As `_form`, with the variable `closing` in a format whose last answer is rendered without a stop token."""
        closing = (("closing", json.dumps(self.closing)),) if self.closing else ()
        return replace(self._form, arguments=(*self.arguments, *closing))

    def _needs_jinja(self, messages: list[Message]) -> bool:
        """Whether a conversation has tools, or something else that the other attributes do not describe."""
        if self.jinja_only or self.arguments or (messages and messages[0].get("tools")):
            return bool(messages)
        for number, message in enumerate(messages):
            role = message.get("role")
            if role == "tool" or message.get("tool_calls"):
                return True
            if role == "system" and (self.jinja_system or (number and self.system_at_start)):
                return True
        return False

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """As `Template.render`."""
        if self._needs_jinja(messages):
            return self._form.render(messages, add_generation_prompt)
        return super().render(messages, add_generation_prompt)

    def segments(self, messages: list[Message], add_generation_prompt: bool = False) -> Iterator[Segment]:
        """As `Template.segments`; with tools, contents are not told from the rest."""
        if not self._needs_jinja(messages):
            yield from super().segments(messages, add_generation_prompt)
        elif add_generation_prompt:
            yield Segment(self._form.render(messages, True))
        else:
            yield from self._training_form.segments(messages)

    def check(self, messages: list[Message]) -> None:
        """As `Template.check`."""
        if not self._needs_jinja(messages):
            return super().check(messages)
        for turn, message in enumerate(messages, 1):
            for call in message.get("tool_calls") or []:
                if not isinstance(call.get("function"), dict):
                    raise UserError(
                        f"turn {turn} has a tool call of the type {call.get('type')!r}, and template {self.name!r} has "
                        "calls of the type 'function' only; remove it, or write it as the call of a function"
                    )
        return self._training_form.check(messages)

    def encode_batch(
        self,
        conversations: list[list[Message]],
        tokenizer,
        allow_special: bool = False,
        train_on: str | int = "all_turns",
    ) -> list[dict[str, list[int]]]:
        """As `Template.encode_batch`."""
        rows: dict[int, dict[str, list[int]]] = {}
        for needed, encode in ((True, self._training_form.encode_batch), (False, super().encode_batch)):
            numbers = [i for i, messages in enumerate(conversations) if self._needs_jinja(messages) == needed]
            some = [conversations[i] for i in numbers]
            encoded = encode(some, tokenizer, allow_special, train_on) if some else []
            rows |= dict(zip(numbers, encoded, strict=True))
        return [rows[i] for i in range(len(conversations))]

    def notes(self, messages: list[Message], train_on: str | int = "all_turns") -> list[RowNote]:
        """As `Template.notes`."""
        if self._needs_jinja(messages):
            return self._training_form.notes(messages, train_on)
        return super().notes(messages, train_on)

    def full_text(self) -> str:
        """As `text`, with all that the Jinja text writes."""
        return f"{self.text()}\n{self.jinja}"

    @property
    def shows_date(self) -> bool:
        """Whether the format shows the day on which it is rendered."""
        return "strftime_now" in self.to_jinja()

    @property
    def key(self) -> str:
        """Everything that renderings depend on but the versions of the libraries, for the cache of prepared rows."""
        return repr(self)

    def to_jinja(self) -> str:
        """The Jinja text with the defaults of its arguments, which is saved as `tokenizer.chat_template`."""
        return with_defaults(self._jinja(), self.arguments)

    def _jinja(self) -> str:
        """The Jinja text with its settings."""
        settings = dict(self.settings)
        if "default_system" in self.jinja:
            settings["default_system"] = "none" if self.default_system is None else quoted(self.default_system)
        return "".join(f"{{%- set {name} = {value} %}}\n" for name, value in settings.items()) + self.jinja
