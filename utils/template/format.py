"""`Template`: renders conversations in a chat format and labels the tokens that are trained.

The formats themselves are in `utils/template/catalogue.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from utils.runtime.errors import UserError
from utils.template.jinja import to_jinja
from utils.template.messages import (
    EMPTY_ANSWER,
    MEDIA_FIELDS,
    REASONING_FIELDS,
    UNTRAINED_ANSWER,
    Message,
    RowNote,
    is_empty_answer,
    is_trained_answer,
    select_answers,
    unread_field_notes,
    weight_of,
)
from utils.template.tokenize import Segment, encode_segments, train_everything

_TRY_AUTO = "; --template_name auto uses the tokenizer's own chat template, which may support it"
formats_with_tools: list[str] = []  # names, in the order of the catalogue


@dataclass(frozen=True)
class Template:
    """A chat format as data.

    In the texts, `{content}` stands for a message's content, `{bos}` and `{eos}` for the tokenizer's tokens.

    Attributes:
        name: the value of `--template_name`.
        source: where the format is defined, with its revision.
        models: the models it is for.
        bos: text at the very start, whatever the first role is.
        default_system: the system message of a conversation without one; None for no such message.
        system: a system message; None if the format has no turn for it.
        system_with_user: for formats without a system turn: the first user's content, with the system message put in at
            `{system}`.
        user: a user's turn.
        assistant: the opening of an answer, with which a generation prompt ends.
        before_answer: text between that opening and the answer which is not part of the prompt.
        after_answer: text between the answer and its stop token.
        stop: the token that ends an answer; empty if only `closing` ends a conversation.
        after_stop: text between the stop token and the next turn; never trained.
        end: text after a complete conversation; never trained.
        closing: for formats that end no answer: the stop token that training adds to the last one.
        strip: whether whitespace around a content is removed.
        keep_system: whether `strip` spares a system message that is put into the first user's turn.
        alternate: whether user and assistant must take turns, a user first.
        system_at_start: whether a system message is supported at the start only.
    """

    name: str
    source: str
    models: tuple[str, ...]
    user: str
    assistant: str
    stop: str
    bos: str = ""
    default_system: str | None = None
    system: str | None = None
    system_with_user: str | None = None
    before_answer: str = ""
    after_answer: str = ""
    after_stop: str = ""
    end: str = ""
    closing: str = ""
    strip: bool = False
    keep_system: bool = False
    alternate: bool = False
    system_at_start: bool = False

    # not attributes of a format here, but of a `JinjaTemplate`
    has_tools, jinja_only, jinja_system, shows_date, call_stop = False, False, False, False, ""

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Renders a conversation as text.

        `[{"role": "user", "content": "Hi"}]` → `"<|im_start|>user\\nHi<|im_end|>\\n"`

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}` each, in order.
            add_generation_prompt: whether the text ends with the opening of an answer.

        Raises:
            UserError: the format does not support a role, an order or a content.
        """
        return "".join(segment.text for segment in self.segments(messages, add_generation_prompt))

    def segments(self, messages: list[Message], add_generation_prompt: bool = False) -> Iterator[Segment]:
        """Yields the rendering in segments, which tell contents and trained text from the rest."""
        self.check(messages)
        yield Segment(self.bos)
        system = None
        if self.default_system is not None and messages[0]["role"] != "system":
            yield Segment(self.system.replace("{content}", self.default_system))
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":
                yield Segment(self.assistant + self.before_answer)
                weight = _weight_in(message)
                yield Segment(self._stripped(content), weight, content=True, answer=True)
                yield Segment(self.after_answer + self.stop, weight, answer=True)
                yield Segment(self.after_stop)
            elif message["role"] == "system" and self.system is None:
                system = content
            elif system is not None:
                before, rest = self.system_with_user.split("{system}")
                middle, after = rest.split("{content}")
                if self.keep_system:
                    joined = before + system + middle + self._stripped(content) + after
                else:
                    joined = self._stripped(before + system + middle + content + after)
                yield from _fill(self.user, joined)
                system = None
            else:
                yield from _fill(self.system if message["role"] == "system" else self.user, self._stripped(content))
        if add_generation_prompt:
            yield Segment(self.assistant)
        else:
            yield Segment(self.end)

    def _stripped(self, content: str) -> str:
        return content.strip() if self.strip else content

    def check(self, messages: list[Message]) -> None:
        """Raises a `UserError` that names the turn the format does not support, and why."""
        if not messages:
            raise UserError("the conversation is empty; it needs at least one message")
        for turn, message in enumerate(messages, 1):
            self._check_message(turn, message)
            if message["role"] == "system":
                self._check_system(turn, messages)
        if self.alternate:
            self._check_alternation(messages)

    def _check_message(self, turn: int, message: Message) -> None:
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise UserError(
                f"turn {turn} has the role {role!r}; template {self.name!r} supports system, user and assistant"
                + (_try_formats_with_tools() if role == "tool" else _TRY_AUTO)
            )
        if "tools" in message or "tool_calls" in message:
            raise UserError(
                f"turn {turn} has tools, which template {self.name!r} does not support" + _try_formats_with_tools()
            )
        fields = {**message, **message.get("extra", {})}
        for field in (*REASONING_FIELDS, *MEDIA_FIELDS):
            if fields.get(field):
                raise UserError(f"turn {turn} has {field!r}, which template {self.name!r} does not support" + _TRY_AUTO)
        if not isinstance(content, str):
            raise UserError(f"turn {turn} ({role}) has a content of type {type(content).__name__}, not text")

    def _check_system(self, turn: int, messages: list[Message]) -> None:
        if self.system is None and self.system_with_user is None:
            raise UserError(
                f"turn {turn} is a system message, which template {self.name!r} does not support; put its text at the "
                "start of the first question, or choose another template"
            )
        if self.system_at_start and turn > 1:
            raise UserError(f"turn {turn} is a system message, which template {self.name!r} supports only at the start")
        if self.system is None and (turn > 1 or len(messages) < 2 or messages[1]["role"] != "user"):
            raise UserError(
                f"turn {turn} is a system message, which template {self.name!r} supports only at the start, before a "
                "user's turn"
            )

    def _check_alternation(self, messages: list[Message]) -> None:
        turns = [(turn, m["role"]) for turn, m in enumerate(messages, 1) if m["role"] != "system"]
        for position, (turn, role) in enumerate(turns):
            expected = ("user", "assistant")[position % 2]
            if role != expected:
                raise UserError(
                    f"turn {turn} is {role} where template {self.name!r} needs {expected}: "
                    "user and assistant must take turns, a user first"
                )

    def encode(
        self, messages: list[Message], tokenizer, allow_special: bool = False, train_on: str | int = "all_turns"
    ) -> dict[str, list[int]]:
        """Tokenises a conversation in one piece and labels what is trained.

        Labels cover each answer and the stop token that ends it; all others are -100.

        Args:
            messages: as for `render`.
            tokenizer: a fast tokenizer, which gives the character offsets of its tokens.
            allow_special: whether the text of a special token within a content becomes that token.
            train_on: as for `messages.select_answers`.

        Returns:
            `{"input_ids": [L], "labels": [L]}`, and `"loss_weights": [L]` if an answer has another weight than 0 and 1.
        """
        return self.encode_batch([messages], tokenizer, allow_special, train_on)[0]

    def encode_batch(
        self,
        conversations: list[list[Message]],
        tokenizer,
        allow_special: bool = False,
        train_on: str | int = "all_turns",
    ) -> list[dict[str, list[int]]]:
        """`encode` for many conversations in one call of the tokenizer, which is several times faster."""
        rendered = []
        for messages in conversations:
            messages = select_answers(messages, train_on)
            segments = list(self.segments(messages))
            if self.closing and messages[-1]["role"] == "assistant":
                segments.append(Segment(self.closing, _weight_in(messages[-1]), answer=True))
            rendered.append(train_everything(segments) if train_on == "prompt" else segments)
        return encode_segments(rendered, tokenizer, allow_special, format_text=self.full_text())

    def notes(self, messages: list[Message], train_on: str | int = "all_turns") -> list[RowNote]:
        """Notes the answers that are not trained although `train_on` selects them, and fields that are not rendered."""
        answers = filter(is_trained_answer, select_answers(messages, train_on))
        notes = [RowNote(UNTRAINED_ANSWER, EMPTY_ANSWER) for answer in answers if is_empty_answer(answer)]
        fields = [field for message in messages for field in message.get("extra", {})]
        return notes + unread_field_notes([*fields, *("name" for message in messages if message.get("name"))])

    def special_tokens(self, tokenizer) -> list[str]:
        """The added tokens of a tokenizer that the format uses, e.g. `["<|im_end|>", "<|im_start|>"]`."""
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        return sorted(token for token in added if token in self.text())

    def text(self) -> str:
        """All text that the format itself writes in conversations without tools, joined."""
        others = ("name", "source", "models", "jinja", "settings", "call_stop", "date")
        parts = [getattr(self, field.name) for field in fields(self) if field.name not in others]
        return "\n".join(part for part in parts if isinstance(part, str))

    def full_text(self) -> str:
        """As `text`, with what the format writes in conversations with tools."""
        return self.text()

    def stop_token(self) -> str:
        """The token that ends an answer."""
        return self.stop or self.closing

    @property
    def key(self) -> str:
        """Everything that renderings depend on, for the cache of prepared rows."""
        return repr(self)

    def to_jinja(self) -> str:
        """The format as a Jinja chat template, which is saved as `tokenizer.chat_template`."""
        return to_jinja(self)


def _weight_in(message: Message) -> float:
    """The weight of an answer; 0 if there is nothing of it to train."""
    return 0 if is_empty_answer(message) else weight_of(message)


def _try_formats_with_tools() -> str:
    return f"{_TRY_AUTO}; formats with tools: {', '.join(formats_with_tools)}"


def _fill(form: str, content: str) -> Iterator[Segment]:
    before, after = form.split("{content}")
    yield Segment(before)
    yield Segment(content, content=True)
    yield Segment(after)
