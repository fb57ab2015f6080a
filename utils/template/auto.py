"""`--template_name auto`: the tokenizer's own chat template, with the trained text found in what it renders."""

import contextlib
import importlib.metadata
import json
import os
import re
from dataclasses import dataclass, field, replace
from datetime import datetime
from unittest.mock import patch

from utils.runtime.errors import UserError
from utils.template.format import Template
from utils.template.messages import Message, RowNote, original_fields, select_answers
from utils.template.reading import Reading, read_conversation
from utils.template.tokenize import (
    EscapePatterns,
    Segment,
    encode_segments,
    escape_messages,
    escape_patterns,
    pick_escape_char,
    special_token_pattern,
    split_at_spans,
)

_S, _U, _A, _V = "Ssystemtext", "Uusertext", "Aanswertext", "Vsecondtext"

_PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
_CALLING = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]


@dataclass(frozen=True)
class AutoTemplate:
    """A tokenizer's chat template, with the interface of `Template`.

    Every answer is trained as the whole conversation shows it: what follows the prompt of its turn, up to its stop
    token. Left out and counted are answers whose thinking the template shows only in the last turn, since the model
    would learn to answer without it, and answers whose place is not known exactly.

    Attributes:
        chat_template: the Jinja text.
        tokens: the tokenizer's special tokens by name, which the template may use.
        special: matches the special tokens' texts.
        date: the day that the template prints, `2026-01-31`, at midnight; empty where it prints none.
        name: `auto`.
        text_arguments: whether the arguments of a tool call are given as JSON text, for a template that joins texts.
        null_content: whether a call without text is given the content null, where the template drops it otherwise.
        parts: whether a content is given as a list of parts, for a template that shows no other.
        tool_use: the template of that name for conversations with tools; None where the tokenizer has but one.
    """

    chat_template: str
    tokens: tuple[tuple[str, str], ...]
    special: re.Pattern = field(repr=False)
    date: str = ""
    name: str = "auto"
    text_arguments: bool = False
    null_content: bool = False
    parts: bool = False
    tool_use: "AutoTemplate | None" = None

    @classmethod
    def of(cls, tokenizer, date: str | None = None) -> "AutoTemplate":
        """The template that `tokenizer` brings.

        Args:
            tokenizer: with a chat template.
            date: the day that the template prints, if it prints one; None for today.

        Raises:
            UserError: it brings none, or one whose answers cannot be told from the rest.
        """
        if tokenizer is None or not tokenizer.chat_template:
            path = tokenizer.name_or_path if tokenizer else None
            raise UserError(
                f"--template_name auto takes the tokenizer's own chat template, and that of {path!r} has none; "
                "choose a template by name"
            )
        if special_token_pattern(tokenizer) is None:
            raise UserError(
                f"--template_name auto finds where an answer ends by the tokenizer's special tokens, and that of "
                f"{tokenizer.name_or_path!r} has none; choose a template by name"
            )
        tokens = tuple((key, value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str))
        date = (date or today()) if shows_date(tokenizer) else ""
        default, with_tools = chat_templates_of(tokenizer)
        template = cls(default, tokens, special_token_pattern(tokenizer), date)._fit_input_form()
        template.check(_PROBE)
        return replace(template, tool_use=with_tools and replace(template, chat_template=with_tools)._fit_input_form())

    def _fit_input_form(self) -> "AutoTemplate":
        """Given contents, calls and arguments in the form that the template takes."""
        template, parted = replace(self, parts=False), replace(self, parts=True)
        template = parted if not template._accepts(_PROBE) and parted._accepts(_PROBE) else template
        forms = [(False, False), (True, False), (False, True), (True, True)]
        for null_content, text_arguments in forms:
            form = replace(template, null_content=null_content, text_arguments=text_arguments)
            if form._accepts(_CALLING):
                return form
        return template

    def _select(self, messages: list[Message]) -> "AutoTemplate":
        """The template of a conversation, chosen as `PreTrainedTokenizer.get_chat_template` does."""
        return self.tool_use if self.tool_use and messages and messages[0].get("tools") is not None else self

    def _accepts(self, messages: list[Message]) -> bool:
        try:
            return self._read(messages).refused is None
        except UserError:
            return False

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Renders a conversation as `apply_chat_template` does.

        Raises:
            UserError: what the template refuses, in its own words.
        """
        return self.render_with_marks(messages, add_generation_prompt)[0]

    def render_with_marks(self, messages: list[Message], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The rendering, and where `{% generation %}` marks it."""
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
                )
        except Exception as error:  # Jinja's own, or whatever the template's code runs into
            raise UserError(f"the tokenizer's chat template refuses it: {error}") from error
        return texts[0], [tuple(span) for span in marks[0]] if marks else []

    @property
    def key(self) -> str:
        """Everything the renderings depend on, for the cache of prepared rows."""
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "jinja2")]
        return f"{self!r} {', '.join(versions)}"

    def _as_input(self, message: Message) -> Message:
        """A turn as the template gets it."""
        given = original_fields(message)
        if given.get("tool_calls"):
            if self.text_arguments:
                given["tool_calls"] = [_with_text_arguments(call) for call in given["tool_calls"]]
            if self.null_content and not given["content"]:
                given["content"] = None
        if self.parts and given["content"] is not None:
            given["content"] = [{"type": "text", "text": given["content"]}]
        return given

    def has_generation_marks(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template) is not None

    def check(self, messages: list[Message]) -> None:
        """Raises a `UserError` that says which turn cannot be trained exactly, where none can."""
        if refused := self._read(messages).refused:
            raise UserError(refused)

    def _read(self, messages: list[Message]) -> Reading:
        return read_conversation(self._select(messages), _plain(messages))

    def segments(self, messages: list[Message], mark: str = "", breaks: EscapePatterns | None = None) -> list[Segment]:
        """The rendering in pieces, cut where something trained begins or ends.

        A `mark` is set into each text of the data that `breaks` matches, wherever the template shows it.
        """
        if breaks:
            messages = escape_messages(messages, breaks, mark)
        reading = self._read(messages)
        return split_at_spans(reading.text, reading.spans)

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
        if allow_special:
            return encode_segments([self.segments(messages) for messages in conversations], tokenizer, True)
        marks = [pick_escape_char(_plain(messages)) for messages in conversations]
        breaks = {form: escape_patterns(tokenizer, form.chat_template) for form in {self, self.tool_use or self}}
        pieces = [self.segments(m, marks[i], breaks[self._select(m)]) for i, m in enumerate(conversations)]
        return encode_segments(pieces, tokenizer, allow_special=True, marks=marks)

    def notes(self, messages: list[Message], train_on: str | int = "all_turns") -> list[RowNote]:
        """As `Template.notes`."""
        return self._read(select_answers(messages, train_on)).notes

    def special_tokens(self, tokenizer) -> list[str]:
        """The tokenizer's special tokens that a conversation shows."""
        return sorted(set(self.special.findall(self.render(_PROBE))))

    def prompt_only_suffix(self) -> str:
        """What a prompt ends with that a plain answer is shown without: DeepSeek-R1's `<think>\\n`; often nothing."""
        prompt, text = self.render(_PROBE[:1], add_generation_prompt=True), self.render(_PROBE)
        return prompt[len(os.path.commonprefix([prompt, text])) :]

    def stop_token(self) -> str:
        """The token that ends an answer."""
        text, ((start, end),) = self._read(_PROBE)[:2]
        return self.special.findall(text[start:end])[-1]

    def to_jinja(self) -> str:
        """The template as it came."""
        return self.chat_template


def chat_templates_of(tokenizer) -> tuple[str, str | None]:
    """A tokenizer's chat template, and the one for conversations with tools where that is another.

    Raises:
        UserError: it has several by name, and none is named `default`.
    """
    try:
        default, with_tools = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[])
    except ValueError:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has several chat templates "
            f"({', '.join(sorted(tokenizer.chat_template))}) and none is named 'default', which transformers takes; "
            "name one of them so, or choose a template with --template_name"
        ) from None
    return default, with_tools if with_tools != default else None


def _with_text_arguments(call):
    function = call.get("function", {}) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _plain(messages: list[Message]) -> str:
    """All of a conversation's text as it is; Python's own `str` would escape what cannot be printed."""
    return json.dumps(messages, ensure_ascii=False)


def today() -> str:
    """The day by this machine's clock: `2026-01-31`."""
    return datetime.now().date().isoformat()


def shows_date(tokenizer) -> bool:
    """Whether a chat template of the tokenizer's prints the day on which it renders."""
    own = tokenizer.chat_template
    return any("strftime_now" in text for text in (own.values() if isinstance(own, dict) else [own or ""]))


class _FixedClock:
    """Stands for `datetime.datetime`, of which a template only sees `now()`."""

    def __init__(self, day: str):
        self._day = day

    def now(self) -> datetime:
        return datetime.fromisoformat(self._day)


def fixed_date(day: str):
    """Renders chat templates as transformers does at midnight of `day`; as it does now where `day` is empty.

    `strftime_now` of a template calls `datetime.now()` of transformers' module, and no argument can replace it.
    """
    from transformers.utils import chat_template_utils

    return patch.object(chat_template_utils, "datetime", _FixedClock(day)) if day else contextlib.nullcontext()


def derive_template(tokenizer) -> Template | None:
    """Reads the pieces of a tokenizer's chat template from three conversations.

    A turn begins with a special token, and an answer ends with the template's stop token. Whoever calls this compares
    the renderings of more conversations, since a Jinja template may do anything else as well.

    Args:
        tokenizer: with a chat template.

    Returns:
        the template, named `auto`; None where the renderings have no such pieces, or print the day.
    """
    try:
        if shows_date(tokenizer):
            return None
        own = AutoTemplate.of(tokenizer)
        return _from_renderings(own, own.stop_token(), special_token_pattern(tokenizer), tokenizer.bos_token or "")
    except (UserError, ValueError):  # refused, or a piece that is not found
        return None


def _from_renderings(own: AutoTemplate, stop: str, special, bos: str) -> Template | None:
    """Raises a `ValueError` where a rendering lacks a piece."""
    system, user, second = (
        {"role": role, "content": text} for role, text in (("system", _S), ("user", _U), ("user", _V))
    )
    answer = {"role": "assistant", "content": _A}
    assistant = own.render([user], True).removeprefix(own.render([user]))
    turns = own.render([user, answer, second], True)
    between = _between(turns, _U, _A)
    where = between.index(assistant)
    after_user, before_answer = between[:where], between[where + len(assistant) :]
    tail = _between(turns, _A, _V)
    stop_at = tail.index(stop)
    after_answer, rest = tail[:stop_at], tail[stop_at + len(stop) :]
    opening = special.search(rest)  # of the second user's turn
    if opening is None or not assistant:
        return None
    after_stop, before_user = rest[: opening.start()], rest[opening.start() :]
    alone = own.render([user], True)
    head = alone[: alone.index(_U)].removesuffix(before_user)
    template = Template(
        name="auto", source="the tokenizer's own chat template", models=(),
        user=f"{before_user}{{content}}{after_user}", assistant=assistant, before_answer=before_answer,
        after_answer=after_answer, stop=stop, after_stop=after_stop, bos=head,
    )  # fmt: skip
    try:
        start = own.render([system, user], True)
    except UserError:
        return template  # without a system message
    if _S not in start:
        return template
    before_system = start[: start.index(_S)]
    after_system = _between(start, _S, _U).removesuffix(before_user)
    # a BOS token of its own stands before the special token that opens the turn
    first = bos if bos and special.match(before_system.removeprefix(bos)) and before_system.startswith(bos) else ""
    before_system = before_system.removeprefix(first)
    template = replace(template, bos=first, system=f"{before_system}{{content}}{after_system}")
    head = head.removeprefix(first)
    if head.startswith(before_system) and head.endswith(after_system) and head:
        default = head[len(before_system) : len(head) - len(after_system)]
        return replace(template, default_system=default)
    return template if not head else None


def _between(text: str, first: str, second: str) -> str:
    start = text.index(first) + len(first)
    return text[start : text.index(second, start)]
