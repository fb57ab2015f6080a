"""What a chat template does: a conversation becomes the text a model sees, and labels for what is trained.

The formats themselves are data, in `utils/template/catalogue.py`.
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
)
from utils.template.tokenize import Segment, encode_segments

_TOOLS = " (--template_name auto takes the tokenizer's own, which may have tools)"
_OWN = " (--template_name auto takes the tokenizer's own, which may have one)"


@dataclass(frozen=True)
class Template:
    """A chat format as data.

    `{content}` stands for a message's text, `{bos}` and `{eos}` for the tokenizer's tokens.

    Attributes:
        name: what `--template_name` takes.
        source: where the format is defined, with its revision.
        models: the models it is for.
        bos: text that stands once at the very start, whatever the first role.
        default_system: the system message of a conversation that brings none; None for no such message.
        system: a system message; None where the format has no place of its own for one.
        system_with_user: the first user's text when a system message comes before it, with `{system}`.
        user: a user's turn.
        assistant: what opens an answer; a prompt for generation ends with it.
        before_answer: text between that and the answer which is not part of the prompt.
        after_answer: text between the answer and its stop token.
        stop: the token that ends an answer; empty where only `closing` ends a conversation.
        after_stop: text between the stop token and the next turn; never trained.
        end: text after a finished conversation; never trained.
        closing: a stop token that training adds to the last answer, where the official rendering has none.
        strip: whether spaces around a content are removed.
        alternate: whether user and assistant must take turns, a user first.
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
    alternate: bool = False

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Renders a conversation as the model sees it.

        `[{"role": "user", "content": "Hi"}]` → `"<|im_start|>user\\nHi<|im_end|>\\n"`

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}` in order.
            add_generation_prompt: whether to end with the opening of an answer.

        Raises:
            UserError: a role, an order or a content the format does not have.
        """
        return "".join(segment.text for segment in self.segments(messages, add_generation_prompt))

    def segments(self, messages: list[Message], add_generation_prompt: bool = False) -> Iterator[Segment]:
        """Yields the rendering in pieces, so that contents and trained text are known by where they stand."""
        self.check(messages)
        yield Segment(self.bos)
        system = None
        if self.default_system is not None and messages[0]["role"] != "system":
            yield Segment(self.system.replace("{content}", self.default_system))
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":
                yield Segment(self.assistant + self.before_answer)
                trained = is_trained_answer(message) and not is_empty_answer(message)
                yield Segment(self._stripped(content), trained, content=True, answer=True)
                yield Segment(self.after_answer + self.stop, trained)
                yield Segment(self.after_stop)
            elif message["role"] == "system" and self.system is None:
                system = content
            elif system is not None:
                before, rest = self.system_with_user.split("{system}")
                middle, after = rest.split("{content}")
                whole = before + system + middle + content + after
                yield from _wrapped(self.user, self._stripped(whole))
                system = None
            else:
                yield from _wrapped(self.system if message["role"] == "system" else self.user, self._stripped(content))
        if add_generation_prompt:
            yield Segment(self.assistant)
        else:
            yield Segment(self.end)

    def _stripped(self, content: str) -> str:
        return content.strip() if self.strip else content

    def check(self, messages: list[Message]) -> None:
        """Raises a `UserError` that says which turn the format cannot hold, and why."""
        if not messages:
            raise UserError("the conversation is empty; it needs at least one message")
        for turn, message in enumerate(messages, 1):
            role, content = message.get("role"), message.get("content")
            if role not in ("system", "user", "assistant"):
                raise UserError(
                    f"turn {turn} has the role {role!r}; template {self.name!r} knows system, user and assistant"
                    + _TOOLS
                )
            if "tools" in message or "tool_calls" in message:
                raise UserError(f"turn {turn} has tools, for which template {self.name!r} has no form" + _TOOLS)
            fields = {**message, **message.get("extra", {})}
            for field in (*REASONING_FIELDS, *MEDIA_FIELDS):
                if fields.get(field):
                    raise UserError(f"turn {turn} has {field!r}, for which template {self.name!r} has no form" + _OWN)
            if not isinstance(content, str):
                raise UserError(f"turn {turn} ({role}) has a content of type {type(content).__name__}, not text")
            if role == "system":
                self._check_system(turn, messages)
        if self.alternate:
            self._check_alternation(messages)

    def _check_system(self, turn: int, messages: list[Message]) -> None:
        if self.system is None and self.system_with_user is None:
            raise UserError(f"turn {turn} is a system message, which template {self.name!r} does not have")
        if self.system is None and (turn > 1 or len(messages) < 2 or messages[1]["role"] != "user"):
            raise UserError(
                f"turn {turn} is a system message, which template {self.name!r} has only at the start, before a user"
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
        """Tokenises a conversation once as a whole and labels what is trained.

        Labels cover each answer and the stop token that ends it; all else is -100.

        Args:
            messages: as for `render`.
            tokenizer: a fast tokenizer, whose offsets tell which token covers which text.
            allow_special: whether a special token's text within a content becomes that token.
            train_on: `all_turns`, `last_turn` for the last answer alone, or how many of the last answers.

        Returns:
            `{"input_ids": [L], "labels": [L]}`
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
        pieces = []
        for messages in conversations:
            messages = select_answers(messages, train_on)
            segments = list(self.segments(messages))
            if self.closing and messages[-1]["role"] == "assistant":
                segments.append(
                    Segment(self.closing, is_trained_answer(messages[-1]) and not is_empty_answer(messages[-1]))
                )
            pieces.append(segments)
        return encode_segments(pieces, tokenizer, allow_special, written=self.text())

    def notes(self, messages: list[Message], train_on: str | int = "all_turns") -> list[RowNote]:
        """Which answers that `train_on` has trained are not, why, and which fields of the turns no token shows."""
        answers = filter(is_trained_answer, select_answers(messages, train_on))
        notes = [RowNote(UNTRAINED_ANSWER, EMPTY_ANSWER) for answer in answers if is_empty_answer(answer)]
        fields = [field for message in messages for field in message.get("extra", {})]
        return notes + unread_field_notes([*fields, *("name" for message in messages if message.get("name"))])

    def special_tokens(self, tokenizer) -> list[str]:
        """The tokenizer's special tokens that the format uses, e.g. `["<|im_end|>", "<|im_start|>"]`."""
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        return sorted(token for token in added if token in self.text())

    def text(self) -> str:
        """All that the format itself writes, end to end."""
        parts = [getattr(self, field.name) for field in fields(self) if field.name not in ("name", "source", "models")]
        return "\n".join(part for part in parts if isinstance(part, str))

    def stop_token(self) -> str:
        """The token that ends an answer."""
        return self.stop or self.closing

    @property
    def key(self) -> str:
        """Everything the renderings depend on, for the cache of prepared rows."""
        return repr(self)

    def to_jinja(self) -> str:
        """The format as a Jinja chat template, saved as `tokenizer.chat_template`."""
        return to_jinja(self)


def _wrapped(form: str, content: str) -> Iterator[Segment]:
    before, after = form.split("{content}")
    yield Segment(before)
    yield Segment(content, content=True)
    yield Segment(after)
