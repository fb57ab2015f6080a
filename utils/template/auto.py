"""`--template_name auto`: the tokenizer's own Jinja chat template, with the interface of `Template`."""

import functools
import json
import os
import re
from dataclasses import dataclass, field, replace

from utils.runtime.errors import UserError
from utils.template.dates import fixed_date, shows_date, today
from utils.template.derived import from_renderings
from utils.template.format import Template
from utils.template.messages import Message, RowNote, original_fields, select_answers, weight_of, without_marks
from utils.template.reading import Reading, read_as_form, read_at_once, read_conversation
from utils.template.tokenize import (
    EscapePatterns,
    Segment,
    encode_segments,
    escape_messages,
    escape_patterns,
    pick_escape_char,
    special_token_pattern,
    split_at_spans,
    train_everything,
)

# the conversations that a new template is tried with
_PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
_CALL_PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
# conversations whose renderings must be those of the derived form before it is used
_TURNS = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
_FORM_PROBES = [_PROBE, _TURNS, [{"role": "system", "content": "Be kind."}, *_TURNS], _TURNS[:-1]]


@dataclass(frozen=True)
class AutoTemplate:
    """A tokenizer's chat template, with the interface of `Template`.

    Each answer is trained as the rendering of the whole conversation shows it: from the end of its prompt up to its
    stop token. Not trained, but counted, are answers whose reasoning the template renders only in the last turn,
    since the model would learn to answer without it, and answers that cannot be located exactly.

    Attributes:
        chat_template: the Jinja text.
        tokens: name → text of the tokenizer's special tokens, which the template may use.
        special: matches the text of any special token.
        date: the day that the template shows, `2026-01-31`, at midnight; empty if it shows none.
        name: `auto`, or that of a format of this project whose Jinja text this is.
        exact_marks: whether `{% generation %}` encloses every answer exactly, stop token included.
        text_arguments: whether the arguments of tool calls are passed as JSON text, for a template that joins texts.
        null_content: whether a tool call without text is passed with null as content, where the template requires it.
        parts: whether a content is passed as a list of parts, for a template that renders no other form.
        tool_use: the template for conversations with tools; None if the tokenizer has only one.
        form: the same format as data, by which the answers of plain conversations are located in one rendering; None
            if no such form renders and labels the same.
        arguments: name → value as JSON of further arguments of the template.
    """

    chat_template: str
    tokens: tuple[tuple[str, str], ...]
    special: re.Pattern = field(repr=False)
    date: str = ""
    name: str = "auto"
    exact_marks: bool = False
    text_arguments: bool = False
    null_content: bool = False
    parts: bool = False
    tool_use: "AutoTemplate | None" = None
    form: Template | None = field(default=None, repr=False, compare=False)
    arguments: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, tokenizer, date: str | None = None) -> "AutoTemplate":
        """Reads the chat template of `tokenizer`.

        Args:
            tokenizer: with a chat template.
            date: the day that the template shows, if it shows one; None for today.

        Raises:
            UserError: it has none, or one whose answers cannot be located.
        """
        if tokenizer is None or not tokenizer.chat_template:
            path = tokenizer.name_or_path if tokenizer else None
            raise UserError(
                f"--template_name auto takes the tokenizer's own chat template, and that of {path!r} has none; "
                "choose a template by name"
            )
        if special_token_pattern(tokenizer) is None:
            raise UserError(
                f"--template_name auto finds the end of an answer by the tokenizer's special tokens, and that of "
                f"{tokenizer.name_or_path!r} has none; choose a template by name"
            )
        tokens = tuple((key, value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str))
        date = (date or today()) if shows_date(tokenizer) else ""
        default, with_tools = chat_templates_of(tokenizer)
        template = cls(default, tokens, special_token_pattern(tokenizer), date)._fit_input_form()
        template.check(_PROBE)
        template = replace(template, form=template._derive_form(tokenizer.bos_token or ""))
        return replace(template, tool_use=with_tools and replace(template, chat_template=with_tools)._fit_input_form())

    def with_arguments(self, arguments: tuple[tuple[str, str], ...]) -> "AutoTemplate":
        """Returns the template with further arguments."""
        own = {"arguments": tuple((dict(self.arguments) | dict(arguments)).items()), "form": None}
        template, tool_use = replace(self, **own), self.tool_use and replace(self.tool_use, **own)
        form = template._derive_form(dict(self.tokens).get("bos_token", ""))
        return replace(template, form=form, tool_use=tool_use)

    def _fit_input_form(self) -> "AutoTemplate":
        """Chooses the form of contents, tool calls and arguments that the template accepts."""
        template, parted = replace(self, parts=False), replace(self, parts=True)
        template = parted if not template._accepts(_PROBE) and parted._accepts(_PROBE) else template
        forms = [(False, False), (True, False), (False, True), (True, True)]
        for null_content, text_arguments in forms:
            form = replace(template, null_content=null_content, text_arguments=text_arguments)
            if form._accepts(_CALL_PROBE):
                return form
        return template

    def _derive_form(self, bos: str) -> Template | None:
        """Derives `form`, and compares what it makes of a few conversations with what the Jinja text makes of them."""
        try:
            derived = replace(self, form=from_renderings(self, self.stop_token(), self.special, bos))
        except (UserError, ValueError):  # refused, or a piece that is not found
            return None
        for messages in _FORM_PROBES:
            try:
                if read_as_form(derived, messages) not in (None, read_at_once(self, messages)):
                    return None
            except UserError:
                continue  # a role or an order that the template refuses
        return derived.form

    def _select(self, messages: list[Message]) -> "AutoTemplate":
        """Returns the template for a conversation, as `PreTrainedTokenizer.get_chat_template` chooses it."""
        return self.tool_use if self.tool_use and messages and messages[0].get("tools") is not None else self

    def _accepts(self, messages: list[Message]) -> bool:
        try:
            return self._read(messages).refused is None
        except UserError:
            return False

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Renders a conversation as `apply_chat_template` does.

        Raises:
            UserError: the template refuses the conversation; the message is its own.
        """
        return self.render_with_marks(messages, add_generation_prompt)[0]

    def render_with_marks(self, messages: list[Message], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Renders a conversation; returns the text and the spans that `{% generation %}` marks in it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            raise UserError("the conversation is empty; it needs at least one message")
        if (template := self._select(messages)) is not self:
            return template.render_with_marks(messages, prompt)
        try:
            with fixed_date(self.date):
                texts, marks = render_jinja_template(
                    [[self._as_input(message) for message in messages]],
                    tools=messages[0].get("tools"),
                    chat_template=self.chat_template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=self.has_generation_marks(),
                    **dict(self.tokens),
                    **{name: json.loads(value) for name, value in self.arguments},
                )
        except Exception as error:  # Jinja's own, or whatever the template's code runs into
            raise UserError(f"{self.label} refuses it: {error}") from error
        return texts[0], [tuple(span) for span in marks[0]] if marks else []

    def variables(self) -> set[str]:
        """The words in the template's code, among them its arguments."""
        code = re.findall(r"\{[{%].*?[%}]\}", self.chat_template, re.DOTALL)
        return {word for part in code for word in re.findall(r"[A-Za-z_]\w*", part)}

    @property
    def label(self) -> str:
        """How messages call the template."""
        return "the tokenizer's chat template" if self.name == "auto" else f"template {self.name!r}"

    @property
    def key(self) -> str:
        """Everything that renderings depend on but the versions of the libraries, for the cache of prepared rows."""
        return repr(self)

    def _as_input(self, message: Message) -> Message:
        """Converts a message to the form that the template accepts."""
        fields = original_fields(message)
        if fields.get("tool_calls"):
            if self.text_arguments:
                fields["tool_calls"] = [_with_text_arguments(call) for call in fields["tool_calls"]]
            if self.null_content and not fields["content"]:
                fields["content"] = None
        if self.parts and fields["content"] is not None:
            fields["content"] = [{"type": "text", "text": fields["content"]}]
        return fields

    def has_generation_marks(self) -> bool:
        """Whether the template marks its answers with `{% generation %}`."""
        return _marks_answers(self.chat_template)

    def check(self, messages: list[Message]) -> None:
        """Raises a `UserError` that names the turn because of which a conversation cannot be trained exactly."""
        if refused := self._read(messages).refused:
            raise UserError(refused)

    def _read(self, messages: list[Message]) -> Reading:
        return read_conversation(self._select(messages), _dump(messages))

    def segments(
        self,
        messages: list[Message],
        escape_char: str = "",
        patterns: EscapePatterns | None = None,
        everything: bool = False,
    ) -> list[Segment]:
        """Renders a conversation, split where an answer that is trained begins or ends.

        Args:
            messages: as for `render`.
            escape_char: inserted into each text of the data that `patterns` matches.
            patterns: None to escape nothing.
            everything: whether all but untrained answers is trained, `--train_on prompt`.
        """
        if patterns:
            messages = escape_messages(messages, patterns, escape_char)
        if everything:
            reading = self._read(without_marks(messages))
            weights = [weight_of(message) for message in messages if message["role"] == "assistant"]
            if len(weights) != len(reading.spans):
                raise UserError("an answer cannot be told from the rest, as --train_on prompt needs it")
            return train_everything(split_at_spans(reading.text, reading.spans, weights))
        reading = self._read(messages)
        return split_at_spans(reading.text, reading.spans, reading.weights)

    def encode(
        self, messages: list[Message], tokenizer, allow_special: bool = False, train_on: str | int = "all_turns"
    ) -> dict[str, list[int]]:
        """As `Template.encode`."""
        return self.encode_batch([messages], tokenizer, allow_special, train_on)[0]

    def encode_batch(
        self,
        conversations: list[list[Message]],
        tokenizer,
        allow_special: bool = False,
        train_on: str | int = "all_turns",
    ) -> list[dict[str, list[int]]]:
        """As `Template.encode_batch`."""
        conversations = [select_answers(messages, train_on) for messages in conversations]
        everything = train_on == "prompt"
        if allow_special:
            rendered = [self.segments(messages, everything=everything) for messages in conversations]
            return encode_segments(rendered, tokenizer, True)
        chars = [pick_escape_char(_dump(messages)) for messages in conversations]
        patterns = {form: escape_patterns(tokenizer, form.chat_template) for form in {self, self.tool_use or self}}
        segments = [
            self.segments(messages, chars[i], patterns[self._select(messages)], everything)
            for i, messages in enumerate(conversations)
        ]
        return encode_segments(segments, tokenizer, allow_special=True, escape_chars=chars)

    def notes(self, messages: list[Message], train_on: str | int = "all_turns") -> list[RowNote]:
        """As `Template.notes`."""
        return self._read(select_answers(messages, train_on)).notes

    def special_tokens(self, tokenizer) -> list[str]:
        """The tokenizer's special tokens that a plain conversation contains."""
        return sorted(set(self.special.findall(self.render(_PROBE))))

    def prompt_only_suffix(self) -> str:
        """The end of a generation prompt that a plain answer is rendered without.

        It is `<think>\\n` for DeepSeek-R1, and empty for most.
        """
        prompt, text = self.render(_PROBE[:1], add_generation_prompt=True), self.render(_PROBE)
        return prompt[len(os.path.commonprefix([prompt, text])) :]

    def stop_token(self) -> str:
        """The token that ends an answer."""
        text, ((start, end),) = self._read(_PROBE)[:2]
        return self.special.findall(text[start:end])[-1]

    def to_jinja(self) -> str:
        """The template, unchanged but for the defaults of its arguments."""
        return with_defaults(self.chat_template, self.arguments)

    def save_in(self, tokenizer) -> None:
        """Sets the chat template of a tokenizer, which keeps all of its named ones."""
        own = tokenizer.chat_template
        if self.name == "auto" and isinstance(own, dict):
            known = {name: tuple(item for item in self.arguments if item[0] in text) for name, text in own.items()}
            tokenizer.chat_template = {name: with_defaults(text, known[name]) for name, text in own.items()}
        else:
            tokenizer.chat_template = self.to_jinja()


_DEFAULT = re.compile(r"\{%- set (\w+) = \1 if \1 is defined else [^%]* %\}\n")


def with_defaults(chat_template: str, arguments: tuple[tuple[str, str], ...]) -> str:
    """Returns a Jinja template with defaults of its arguments, which a caller may still give other values.

    Args:
        chat_template: the Jinja text; defaults that were set before are replaced.
        arguments: name → value as JSON.
    """
    names, kept = dict(arguments), ""
    while match := _DEFAULT.match(chat_template):
        chat_template = chat_template[match.end() :]
        kept += "" if match[1] in names else match[0]
    lines = (f"{{%- set {name} = {name} if {name} is defined else {value} %}}\n" for name, value in arguments)
    return "".join(lines) + kept + chat_template


def chat_templates_of(tokenizer) -> tuple[str, str | None]:
    """Returns a tokenizer's chat template, and the one for conversations with tools if that is a different one.

    Raises:
        UserError: it has several by name, and none is named `default`.
    """
    try:
        default, with_tools = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[])
    except ValueError:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has several chat templates "
            f"({', '.join(sorted(tokenizer.chat_template))}), and none is named 'default', the one that transformers "
            "uses; rename one of them, or choose a template with --template_name"
        ) from None
    return default, with_tools if with_tools != default else None


@functools.lru_cache
def _marks_answers(chat_template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", chat_template) is not None


def _with_text_arguments(call):
    function = call.get("function", {}) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _dump(messages: list[Message]) -> str:
    """Serialises messages with all their characters unescaped."""
    return json.dumps(messages, ensure_ascii=False)


# ------------------------------------------------------------------------------ the template as a `Template`


def derive_template(tokenizer) -> Template | None:
    """Derives a `Template` from what a tokenizer's chat template renders for three conversations.

    A turn must begin with a special token, and an answer must end with the template's stop token. Since a Jinja
    template may do anything, the caller has to compare the renderings of more conversations.

    Args:
        tokenizer: with a chat template.

    Returns:
        the template, named `auto`; None if the renderings have another structure or show the date.
    """
    try:
        if shows_date(tokenizer):
            return None
        own = AutoTemplate.of(tokenizer)
        return from_renderings(own, own.stop_token(), special_token_pattern(tokenizer), tokenizer.bos_token or "")
    except (UserError, ValueError):  # refused, or a piece that is not found
        return None
