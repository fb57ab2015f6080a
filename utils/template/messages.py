"""What a turn of a conversation holds beside its text, and which answers are trained."""

from collections.abc import Iterable
from typing import Any, NamedTuple

# fields that describe a row and say nothing that could be trained
DESCRIPTIVE = frozenset(
    [
        "id",
        "_id",
        "idx",
        "index",
        "uid",
        "uuid",
        "key",
        "hash",
        "prompt_id",
        "conversation_id",
        "conversation_hash",
        "row_id",
        "question_id",
        "source",
        "sources",
        "dataset",
        "data_source",
        "origin",
        "origin_dataset",
        "original_dataset",
        "repo",
        "file",
        "file_path",
        "path",
        "dump",
        "url",
        "category",
        "categories",
        "domain",
        "subject",
        "topic",
        "topics",
        "task",
        "task_type",
        "type",
        "lang",
        "language",
        "languages",
        "language_score",
        "tag",
        "tags",
        "meta",
        "metadata",
        "info",
        "extra",
        "version",
        "split",
        "subset",
        "license",
        "licence",
        "author",
        "authors",
        "created",
        "created_at",
        "date",
        "time",
        "timestamp",
        "updated_at",
        "model",
        "models",
        "model_name",
        "generator",
        "teacher",
        "tokens",
        "token_count",
        "num_tokens",
        "n_tokens",
        "length",
        "num_turns",
        "title",
        "parallel_tool_calls",
        "score_chosen",
        "score_rejected",
        "chosen_model",
        "rejected_model",
        "__index_level_0__",
        "difficulty",
        "level",
    ]
    + ["", "Unnamed: 0"]  # pandas' index, written as a column
)
# what programs call the thinking of an answer; transformers gives a template all of the first three
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")

Message = dict[str, Any]
MEDIA = ("images", "image", "videos", "video", "audios", "audio")


class Note(NamedTuple):
    """Something about a row that is trained on, for the report.

    Attributes:
        kind: `UNTRAINED` for an answer that is not trained, `UNREAD` for a field of a turn that no token shows.
        reason: completes "line N …"; the name of the field.
    """

    kind: str
    reason: str


UNTRAINED, UNREAD = "untrained", "unread"
EMPTY = "has an empty answer"


def is_empty(message: Message) -> bool:
    """Whether an answer neither says nor calls anything."""
    return not (message["content"].strip() or message.get("tool_calls") or any(map(message.get, REASONING)))


def is_wanted(message: Message) -> bool:
    """Whether a turn is an answer that the row does not mark as one not to be trained, and `only_answers` neither."""
    return message["role"] == "assistant" and message.get("train") is not False


def only_answers(messages: list[Message], train_on: str | int) -> list[Message]:
    """Marks every answer but those of `train_on` as one that is not trained.

    Args:
        messages: of one conversation.
        train_on: `all_turns`, `last_turn`, or how many of the last answers.
    """
    if train_on == "all_turns":
        return messages
    count = 1 if train_on == "last_turn" else int(train_on)
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"][:-count]
    return [{**message, "train": False} if turn in answers else message for turn, message in enumerate(messages)]


def unread(fields: Iterable[str]) -> list[Note]:
    """Notes of fields that no token shows, each once, without those that only describe a turn."""
    return [Note(UNREAD, f"{field} (of a turn)") for field in dict.fromkeys(fields) if field not in DESCRIPTIVE]


def count_answers(messages: list[Message]) -> int:
    """How many of the turns are the assistant's."""
    return sum(message["role"] == "assistant" for message in messages)


def as_written(message: Message) -> Message:
    """A turn as the row has it: without what this project sets into it, and with its further fields."""
    kept = {key: value for key, value in message.items() if key not in ("tools", "train", "extra")}
    return kept | message.get("extra", {})


# ------------------------------------------------------------------------------ what a rendering shows
