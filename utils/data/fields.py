"""The fields of a row: which are read, which are metadata, and which must not be ignored."""

from collections.abc import Collection
from typing import Any

from utils.template.messages import METADATA_FIELDS, REASONING_FIELDS

MEDIA = "only text is trained here; remove the row, or the field if the text alone is to be trained"
_SYSTEM = "name it 'system' to have it read"
# field that would be ignored although it matters → how to correct a row with it, which is refused
REFUSED = {
    **dict.fromkeys(["image", "images", "image_url", "image_path", "video", "videos", "audio", "audios"], MEDIA),
    **dict.fromkeys(["system_prompt", "system_message", "sys_prompt"], _SYSTEM),
    "functions": 'name it \'tools\', each as {"type": "function", "function": …}, to have them read',
    "chat_template_kwargs": "the template is rendered in one form for all rows; remove the field",
    "documents": "put them into a turn, or remove the field",
}
# outside the turns of a row, reasoning is not tied to one of its answers
_REASONING = dict.fromkeys(
    REASONING_FIELDS,
    "write the row as {\"messages\": […]} with 'reasoning_content' in the assistant's turn, or remove the field",
)
# row type → the fields that are read
READ = {
    "messages": ("messages", "system", "tools"),
    "conversations": ("conversations", "system", "tools"),
    "instruction": ("instruction", "input", "output", "system", "history", "tools"),
    "pair": (
        "prompt", "messages", "conversations", "instruction", "input", "history", "system", "tools", "chosen",
        "rejected", "reject",
    ),
    "text": ("text",),
    "prompt": (
        "prompt", "messages", "conversations", "instruction", "input", "history", "system", "tools", "chosen",
        "rejected", "reject", "output", "reference",
    ),
}  # fmt: skip
# the recipe of each type of rows → fields by which such a row is recognised where another type is needed
RECOGNISED_BY = {
    "train_args/dpo/base.py": ("chosen", "rejected", "reject"),
    "train_args/sft/base.py": ("messages", "conversations", "output"),
    "train_args/pretrain/base.py": ("text",),
}
_MAIN = {"instruction": "output", "pair": "chosen"}  # row type → the field named in a message, where it is another
# fields with a question, an answer or both; next to the fields that are read they are a second conversation
_CONVERSATION = (
    "messages", "conversations", "conversation", "instruction", "input", "output", "history", "prompt", "completion",
    "response", "chosen", "rejected", "reject",
)  # fmt: skip


def is_empty(value: Any) -> bool:
    """Whether a value is null, NaN (an empty cell in pandas), a blank text, an empty list or object.

    Tables have every column in each row, so a field without a value counts as one that is not there.
    """
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value or value in ([], {})


def field_problem(row: dict, kind: str, turns: list[dict] = ()) -> str | None:
    """Describes what is wrong with the fields that are not read; None if none of them matters.

    `field_problem({"messages": […], "images": ["a.png"]}, "messages")` → `"has a field 'images', which is not read: …"`

    Args:
        row: as it stands in its file.
        kind: a key of `READ`.
        turns: the messages read from it; a field that repeats one, or all of them, is no second conversation.
    """
    refused = REFUSED if kind in ("text", "prompt") else REFUSED | _REASONING
    for name, value in row.items():
        if name in READ[kind] or name in METADATA_FIELDS or is_empty(value):
            continue
        if name in refused:
            return f"has a field {name!r}, which is not read: {refused[name]}"
        if kind in ("text", "prompt"):
            continue
        if name in _CONVERSATION and not _repeats(name, row, kind, turns):
            return f"has {name!r} beside {_MAIN.get(kind, kind)!r}, which is the conversation already; keep one of them"
        if name == "context" and row.get("instruction") and not _is_within(value, turns):  # Dolly's
            return "has a field 'context', which is not read and changes the question; name it 'input', or remove it"
        if name == "label" and _is_false(value):
            return f"has 'label' {value!r}, the mark of an answer that is not wanted; remove the row, or the field"
        if name == "weight" and value not in (1, "1", "1.0"):
            return f"has 'weight' {value!r}, but all rows weigh the same here; remove the field, or the row"
    return None


def unread_fields(row: dict, read: Collection[str]) -> list[str]:
    """The fields of a row without a `field_problem` that are neither read nor known to be descriptive.

    `unread_fields({"text": "Hi", "id": 3, "quality": 5}, ("text",))` → `["quality"]`

    Args:
        row: as it stands in its file.
        read: the names of the fields that are read.
    """
    return [
        str(name)
        for name, value in row.items()
        if name not in read and name not in METADATA_FIELDS and not is_empty(value)
    ]


def conversation_kind(row: dict) -> str | None:
    """Which field holds an SFT row's conversation, a key of `READ`; None where no field does.

    A field without a value gives way to one that has one.
    """
    names = {"messages": "messages", "conversations": "conversations", "output": "instruction"}
    filled = [kind for name, kind in names.items() if not is_empty(row.get(name))]
    empty = sorted((row[name] is None, place, kind) for place, (name, kind) in enumerate(names.items()) if name in row)
    return (filled or [kind for *_, kind in empty] or [None])[0]


def _repeats(name: str, row: dict, kind: str, turns: list[dict]) -> bool:
    """Whether a field repeats a turn or the whole conversation.

    A rejected answer beside a conversation that is the chosen one (UltraFeedback) is no second conversation either.
    """
    value = row["chosen"] if name in ("rejected", "reject") and row.get("chosen") else row[name]
    if isinstance(value, str):
        return value.strip() in {str(turn.get("content")).strip() for turn in turns}
    if not isinstance(value, list):
        return False
    return value == row.get(kind) or [_said(turn) for turn in value] == [_said(turn) for turn in turns]


def _is_within(value: Any, turns: list[dict]) -> bool:
    return isinstance(value, str) and any(value.strip() in str(turn.get("content")) for turn in turns)


def _said(turn: Any) -> Any:
    return turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn


def _is_false(value: Any) -> bool:
    return value in (0, "0") or (isinstance(value, str) and value.strip().lower() == "false")  # 0 == False
