"""What a chat template does: a conversation becomes the text a model sees, and labels for what is trained.

The formats themselves are data, in `utils/template.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

from utils.errors import UserError

IGNORED = -100  # the label of a token that is not trained (torch's cross_entropy default)
Message = dict[str, str]


class Segment(NamedTuple):
    """A piece of a rendering; `trained` marks an answer and the stop token that ends it."""

    text: str
    trained: bool = False


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
        system: a system message; None where the format refuses one.
        user: a user's turn.
        assistant: what opens an answer; a prompt for generation ends with it.
        before_answer: text between that and the answer which is not part of the prompt.
        after_answer: text between the answer and its stop token.
        stop: the token that ends an answer.
        after_stop: text between the stop token and the next turn; never trained.
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
    before_answer: str = ""
    after_answer: str = ""
    after_stop: str = ""
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
        """Yields the rendering in pieces, so that the trained ones are known by where they stand."""
        self.check(messages)
        yield Segment(self.bos)
        if self.default_system is not None and messages[0]["role"] != "system":
            yield Segment(self.system.replace("{content}", self.default_system))
        for message in messages:
            content = message["content"].strip() if self.strip else message["content"]
            if message["role"] == "assistant":
                yield Segment(self.assistant + self.before_answer)
                yield Segment(content + self.after_answer + self.stop, trained=True)
                yield Segment(self.after_stop)
            else:
                form = self.system if message["role"] == "system" else self.user
                yield Segment(form.replace("{content}", content))
        if add_generation_prompt:
            yield Segment(self.assistant)

    def check(self, messages: list[Message]) -> None:
        """Raises a `UserError` that says which turn the format cannot hold, and why."""
        if not messages:
            raise UserError("the conversation is empty; it needs at least one message")
        for turn, message in enumerate(messages, 1):
            role, content = message.get("role"), message.get("content")
            if role not in ("system", "user", "assistant"):
                raise UserError(
                    f"turn {turn} has the role {role!r}; template {self.name!r} knows system, user and assistant"
                )
            if not isinstance(content, str):
                raise UserError(f"turn {turn} ({role}) has a content of type {type(content).__name__}, not text")
            if role == "system" and self.system is None:
                raise UserError(f"turn {turn} is a system message, which template {self.name!r} does not have")
        if self.alternate:
            self._check_alternation(messages)

    def _check_alternation(self, messages: list[Message]) -> None:
        turns = [(turn, m["role"]) for turn, m in enumerate(messages, 1) if m["role"] != "system"]
        for position, (turn, role) in enumerate(turns):
            expected = ("user", "assistant")[position % 2]
            if role != expected:
                raise UserError(
                    f"turn {turn} is {role} where template {self.name!r} needs {expected}: "
                    "user and assistant must take turns, a user first"
                )

    def encode(self, messages: list[Message], tokenizer) -> dict[str, list[int]]:
        """Tokenises a conversation once as a whole and labels what is trained.

        Labels cover each answer and the stop token that ends it; all else is -100.

        Args:
            messages: as for `render`.
            tokenizer: a fast tokenizer, whose offsets tell which token covers which text.

        Returns:
            `{"input_ids": [L], "labels": [L]}`
        """
        return self.encode_batch([messages], tokenizer)[0]

    def encode_batch(self, conversations: list[list[Message]], tokenizer) -> list[dict[str, list[int]]]:
        """`encode` for many conversations in one call of the tokenizer, which is several times faster."""
        texts, spans = [], []
        for messages in conversations:
            text, trained = "", []
            for segment in self.segments(messages):
                if segment.trained:
                    trained.append((len(text), len(text) + len(segment.text)))
                text += segment.text
            texts.append(text)
            spans.append(trained)
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
        return [
            {"input_ids": ids, "labels": label_spans(ids, offsets, trained)}
            for ids, offsets, trained in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
        ]

    def special_tokens(self, tokenizer) -> list[str]:
        """The tokenizer's special tokens that the format uses, e.g. `["<|im_end|>", "<|im_start|>"]`."""
        text = "".join(value for field in fields(self) if isinstance(value := getattr(self, field.name), str))
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        return sorted(token for token in added if token in text)

    def to_jinja(self) -> str:
        """The format as a Jinja chat template, saved as `tokenizer.chat_template`.

        `{% generation %}` marks what is trained, so that `apply_chat_template(...,
        return_assistant_tokens_mask=True)` of transformers gives our labels.
        """
        content = "message['content'] | trim" if self.strip else "message['content']"
        parts = [_literal(self.bos), self._jinja_checks(), "{% for message in messages %}"]
        if self.default_system is not None:
            default = _literal(self.system.replace("{content}", self.default_system))
            parts.append("{% if loop.first and message['role'] != 'system' %}" + default + "{% endif %}")
        parts.append("{% if message['role'] == 'assistant' %}")
        parts.append(_literal(self.assistant + self.before_answer) + "{% generation %}{{ " + content + " }}")
        parts.append(_literal(self.after_answer + self.stop) + "{% endgeneration %}" + _literal(self.after_stop))
        for role, form in (("system", self.system), ("user", self.user)):
            if form is not None:
                before, after = form.split("{content}")
                branch = _literal(before) + "{{ " + content + " }}" + _literal(after)
                parts.append("{% elif message['role'] == '" + role + "' %}" + branch)
        parts.append("{% endif %}{% endfor %}")
        parts.append("{% if add_generation_prompt %}" + _literal(self.assistant) + "{% endif %}")
        return "".join(parts)

    def _jinja_checks(self) -> str:
        roles = ["user", "assistant"] + (["system"] if self.system is not None else [])
        text = (
            "{% for message in messages %}{% if message['role'] not in " + repr(roles) + " %}"
            "{{ raise_exception('this format has no role ' ~ message['role']) }}{% endif %}{% endfor %}"
        )
        if self.alternate:
            text += (
                "{% for message in messages | rejectattr('role', 'equalto', 'system') %}"
                "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
                "{{ raise_exception('user and assistant must take turns, a user first') }}{% endif %}{% endfor %}"
            )
        return text


def _literal(text: str) -> str:
    """`"a\\n"` → `"{{ 'a\\n' }}"`: as an expression, since Jinja drops a line feed after a block."""
    if not text:
        return ""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return "{{ '" + escaped + "' }}"


def label_spans(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """Labels the tokens that cover any character of the spans; both come in order.

    `label_spans([7, 8, 9], [(0, 2), (2, 3), (3, 5)], [(2, 5)])` → `[-100, 8, 9]`

    Args:
        ids: token ids, [L].
        offsets: each token's start and end in the text, [L].
        spans: starts and ends of the trained text.

    Returns:
        [L], -100 where nothing is trained.
    """
    labels = [IGNORED] * len(ids)
    position = 0
    for start, end in spans:
        while position < len(ids) and offsets[position][1] <= start:
            position += 1
        while position < len(ids) and offsets[position][0] < end:
            labels[position] = ids[position]
            position += 1
    return labels
