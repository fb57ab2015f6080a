"""The messages of a conversation: which of their fields carry text, which answers are trained."""

from collections.abc import Iterable
from typing import Any, NamedTuple

Message = dict[str, Any]

# fields that only describe a row or a turn
METADATA_FIELDS = frozenset((
    "id", "_id", "idx", "index", "uid", "uuid", "key", "hash", "prompt_id", "conversation_id",
    "conversation_hash", "row_id", "question_id", "source", "sources", "dataset", "data_source", "origin",
    "origin_dataset", "original_dataset", "repo", "file", "file_path", "path", "dump", "url", "category",
    "categories", "domain", "subject", "topic", "topics", "task", "task_type", "type", "lang", "language",
    "languages", "language_score", "tag", "tags", "meta", "metadata", "info", "extra", "version", "split",
    "subset", "license", "licence", "author", "authors", "created", "created_at", "date", "time", "timestamp",
    "updated_at", "model", "models", "model_name", "generator", "teacher", "tokens", "token_count", "num_tokens",
    "n_tokens", "length", "num_turns", "title", "parallel_tool_calls", "score_chosen", "score_rejected",
    "chosen_model", "rejected_model", "__index_level_0__", "difficulty", "level",
    "", "Unnamed: 0",  # the index of pandas, written as a column
))  # fmt: skip
# names for the reasoning before an answer; transformers passes the first three to chat templates
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
MEDIA_FIELDS = ("images", "image", "videos", "video", "audios", "audio")
# the kinds of a RowNote; stored with prepared rows
UNTRAINED_ANSWER, UNREAD_FIELD = "untrained", "unread"
EMPTY_ANSWER = "has an empty answer"


class RowNote(NamedTuple):
    """Part of a kept row that is not trained or not shown to the model.

    Attributes:
        kind: `UNTRAINED_ANSWER`, or `UNREAD_FIELD` for a field of a turn that is not rendered.
        reason: completes "line N …" for an answer; the name of a field.
    """

    kind: str
    reason: str


def is_empty_answer(message: Message) -> bool:
    """Whether an answer has neither text nor a tool call nor reasoning."""
    return not (message["content"].strip() or message.get("tool_calls") or any(map(message.get, REASONING_FIELDS)))


def weight_of(message: Message) -> float:
    """The factor of a message's part in the loss: its `train`, 1 if it has none, 0 if it is no answer."""
    return float(message.get("train", True)) if message["role"] == "assistant" else 0.0


def is_trained_answer(message: Message) -> bool:
    """Whether a message is an assistant's answer with a weight above 0."""
    return weight_of(message) > 0


def count_answers(messages: list[Message]) -> int:
    """Counts the assistant's messages."""
    return sum(message["role"] == "assistant" for message in messages)


def select_answers(messages: list[Message], train_on: str | int) -> list[Message]:
    """Sets `"train": False` on all answers but those that `train_on` selects.

    Args:
        messages: one conversation.
        train_on: `all_turns`, `prompt` for all turns of all roles, `last_turn`, `last_n:2`, or the number of last
            answers to train.
    """
    if train_on in ("all_turns", "prompt"):
        return messages
    count = 1 if train_on == "last_turn" else int(str(train_on).removeprefix("last_n:"))
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"][:-count]
    return [{**message, "train": False} if turn in answers else message for turn, message in enumerate(messages)]


def without_marks(messages: list[Message]) -> list[Message]:
    """Messages of which every answer is trained alike."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def original_fields(message: Message) -> Message:
    """Returns a message as it was in the data: without this project's own keys, with its additional fields."""
    fields = {key: value for key, value in message.items() if key not in ("tools", "train", "extra")}
    return fields | message.get("extra", {})


def unread_field_notes(names: Iterable[str]) -> list[RowNote]:
    """Makes one note for each field that is not rendered; fields of metadata need none."""
    return [
        RowNote(UNREAD_FIELD, f"{name} (of a turn)") for name in dict.fromkeys(names) if name not in METADATA_FIELDS
    ]
