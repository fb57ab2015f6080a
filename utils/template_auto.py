"""`--template_name auto`: the tokenizer's own chat template, with the trained text found in what it renders."""

import importlib.metadata
import json
import re
from dataclasses import dataclass, field
from typing import Any

from utils.errors import UserError
from utils.segments import (
    Segment,
    break_leaves,
    cut_segments,
    encode_segments,
    free_break,
    only_answers,
    special_pattern,
)
from utils.template_day import on_day, prints_date, today

Message = dict[str, Any]
_PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@dataclass(frozen=True)
class AutoTemplate:
    """A tokenizer's chat template, with the interface of `Template`.

    An answer is trained where the whole conversation shows it as the model would have said it:
    after the prompt of its turn, up to its stop token. A template that shows earlier answers in
    another form once a turn follows, without their thinking say, has only the last one trained.

    Attributes:
        chat_template: the Jinja text.
        tokens: the tokenizer's special tokens by name, which the template may use.
        special: matches the special tokens' texts.
        date: the day that the template prints, `2026-01-31`, at midnight; empty where it prints none.
        name: `auto`.
    """

    chat_template: str
    tokens: tuple[tuple[str, str], ...]
    special: re.Pattern = field(repr=False)
    date: str = ""
    name: str = "auto"

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
        tokens = tuple((key, value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str))
        date = (date or today()) if prints_date(tokenizer) else ""
        template = cls(tokenizer.get_chat_template(), tokens, special_pattern(tokenizer), date)
        template.check(_PROBE)
        return template

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Renders a conversation as `apply_chat_template` does.

        Raises:
            UserError: what the template refuses, in its own words.
        """
        return self._render(messages, add_generation_prompt)[0]

    def _render(self, messages: list[Message], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The rendering, and where `{% generation %}` marks it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            raise UserError("the conversation is empty; it needs at least one message")
        tools = messages[0].get("tools")
        plain = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
        try:
            with on_day(self.date):
                texts, marks = render_jinja_template(
                    [plain],
                    tools=tools,
                    chat_template=self.chat_template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=self._has_marks(),
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

    def _has_marks(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template) is not None

    def check(self, messages: list[Message]) -> None:
        """Raises a `UserError` that says which turn cannot be trained exactly, where none can."""
        text = self.render(messages)
        for turn, message in enumerate(messages):
            if not self._shows(messages, turn, text):
                raise UserError(
                    f"turn {turn + 1} ({message['role']}) has a content or a tool call "
                    "that the tokenizer's chat template does not show"
                )
        self._trained_spans(messages, text)

    def _shows(self, messages: list[Message], turn: int, text: str) -> bool:
        """Whether the rendering would be another without what a turn says, calls or brings as tools."""
        message = messages[turn]
        changed = [
            {k: v for k, v in message.items() if k != key} for key in ("tools", "tool_calls") if message.get(key)
        ]
        if message["role"] in ("system", "tool") and message.get("content"):
            changed.append({**message, "content": message["content"] + "x"})
        for other in changed:
            try:
                if self.render([*messages[:turn], other, *messages[turn + 1 :]]) == text:
                    return False
            except UserError:
                continue  # refused without it, so it matters
        return message["role"] != "user" or message["content"].strip() in text

    def _trained_spans(self, messages: list[Message], text: str) -> list[tuple[int, int]]:
        """Where the answers that are trained stand in the rendering, each with its stop token."""
        spans, reasons = [], []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:turn], add_generation_prompt=True)
            alone = self.render(messages[: turn + 1])
            if not alone.startswith(prompt):
                reasons.append(f"turn {turn + 1}: the answer does not follow the prompt that the template gives for it")
                continue
            end = self._stop_end(alone[len(prompt) :], message)
            if end is None:
                reasons.append(f"turn {turn + 1}: no special token ends the answer")
            elif text.startswith(alone[: len(prompt) + end]):
                spans.append((len(prompt) + _space_before(alone[len(prompt) :], message), len(prompt) + end))
            else:
                reasons.append(f"turn {turn + 1}: the answer is shown in another form once a turn follows")
        if self._has_marks():
            spans = self._marked(messages, spans)
        if not spans and any(message["role"] == "assistant" for message in messages):
            raise UserError(f"no exact mask for the tokenizer's chat template ({reasons[0] if reasons else 'no mark'})")
        return spans

    def _stop_end(self, answer: str, message: Message) -> int | None:
        """Where the answer's stop token ends: the first of the special tokens that stand last."""
        said = message.get("content") or ""
        found = answer.find(said.strip()) if isinstance(said, str) and said.strip() else -1
        content_end = found + len(said.strip()) if found >= 0 else 0
        tokens = [match for match in self.special.finditer(answer, content_end)]
        last = None
        for match in reversed(tokens):
            following = answer[match.end() : last.start()] if last else answer[match.end() :]
            if following.strip():
                break
            last = match
        return last.end() if last else None

    def _marked(self, messages: list[Message], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Of the exact answers, those that the template's own marks train."""
        marks = self._render(messages)[1]
        return [(start, end) for start, end in spans if any(begin < end and start < stop for begin, stop in marks)]

    def segments(self, messages: list[Message], mark: str | None = None) -> list[Segment]:
        """The rendering in pieces, cut where something trained begins or ends.

        A `mark` is set into each special token's text that the data holds, wherever the template shows it.
        """
        if mark:
            messages = break_leaves(messages, self.special, mark)
        text = self.render(messages)
        return cut_segments(text, self._trained_spans(messages, text))

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
        marks = None if allow_special else [free_break(_plain(messages)) for messages in conversations]
        pieces = [self.segments(messages, marks and marks[i]) for i, messages in enumerate(conversations)]
        pieces = [only_answers(segments, train_on) for segments in pieces]
        return encode_segments(pieces, tokenizer, allow_special=True, marks=marks)

    def special_tokens(self, tokenizer) -> list[str]:
        """The tokenizer's special tokens that a conversation shows."""
        return sorted(set(self.special.findall(self.render(_PROBE))))

    def stop_token(self) -> str:
        """The token that ends an answer."""
        start, end = self._trained_spans(_PROBE, self.render(_PROBE))[0]
        return self.special.findall(self.render(_PROBE)[start:end])[-1]

    def to_jinja(self) -> str:
        """The template as it came."""
        return self.chat_template


def _space_before(answer: str, message: Message) -> int:
    """How many spaces the template sets before the content, which are not part of it."""
    said = message.get("content")
    found = answer.find(said) if isinstance(said, str) and said else -1
    return found if found > 0 and not answer[:found].strip() else 0


def _plain(messages: list[Message]) -> str:
    """All of a conversation's text as it is; Python's own `str` would escape what cannot be printed."""
    return json.dumps(messages, ensure_ascii=False)
