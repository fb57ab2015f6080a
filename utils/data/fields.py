"""Fields that no format reads: harmless ones are ignored, the others make the row malformed."""

from collections.abc import Collection, Sequence
from typing import Any

from utils.data.formats import CONVERSATION_FORMATS, PAIR_FORMATS, TURN_FIELDS, Format, holds_turns, is_empty
from utils.template.messages import METADATA_FIELDS, REASONING_FIELDS

MEDIA = "only text is trained here; remove the row, or the field if the text alone is to be trained"
# field that would be ignored although it matters → how to correct a row with it, which is refused
REFUSED = {
    **dict.fromkeys(["image", "images", "image_url", "image_path", "video", "videos", "audio", "audios"], MEDIA),
    "chat_template_kwargs": "the template is rendered in one form for all rows; remove the field",
    "documents": "put them into a turn, or remove the field",
}
# outside the turns of a row, reasoning is not tied to one of its answers
_REASONING = dict.fromkeys(
    REASONING_FIELDS,
    "write the row as {\"messages\": […]} with 'reasoning_content' in the assistant's turn, or remove the field",
)
# fields that a question may need to be understood
_PART_OF_QUESTION = ("context", "passage", "article", "choices", "options", "question", "query")
# fields with a question, an answer or both; next to the fields that are read they are a second conversation
_CONVERSATION = (
    "messages", "conversations", "conversation", "instruction", "input", "output", "history", "prompt",
    "completion", "response", "chosen", "rejected", "reject", "rejected_response", "preferred_output",
    "non_preferred_output",
)  # fmt: skip
# rows to be answered may be of any format, with an answer or without
PROMPT_FIELDS = frozenset(
    name for form in (*CONVERSATION_FORMATS, *PAIR_FORMATS) for name in (*form.reads, "reject", "reference")
)


def field_problem(row: dict, form: Format, turns: Sequence[dict] = ()) -> str | None:
    """Describes what is wrong with the fields of a row that are not read; None if none of them matters.

    `{"messages": […], "images": ["a.png"]}` → `"has a field 'images', which is not read: …"`

    Args:
        row: as it stands in its file.
        form: the format that it is read in.
        turns: the messages read from it; a field that repeats one, or all of them, is no second conversation.
    """
    for name, value in row.items():
        if name in form.reads or name in METADATA_FIELDS or is_empty(value):
            continue
        if problem := refused_field(name) or (None if form.texts else _problem_beside_turns(row, name, form, turns)):
            return problem
    return None if form.texts else _second_conversation(row, form, turns)


def _second_conversation(row: dict, form: Format, turns: Sequence[dict]) -> str | None:
    """Describes a question with its answer in other fields; alone, such a field may be a note on the row."""
    if sum(name not in form.reads for name in row) < 2:
        return None
    for other in CONVERSATION_FORMATS:
        unread = [name for name in other.main if name not in form.reads]
        if len(unread) < 2 or other.filled(row) < 1 or any(_repeats(name, row, form, turns) for name in unread):
            continue
        names, shown = " and ".join(map(repr, unread)), form.turns or form.answers[0]
        return f"has {names} beside {shown!r}, which is the conversation already; keep one of them"
    return None


def prompt_problem(row: dict) -> str | None:
    """As `field_problem`, for a row that is to be answered, not trained."""
    names = (name for name, value in row.items() if name not in PROMPT_FIELDS and not is_empty(value))
    return next(filter(None, map(refused_field, names)), None)


def question_problem(row: dict, form: Format, turns: Sequence[dict]) -> str | None:
    """Describes a field that a question may need to be understood, and that is not read."""
    for name in _PART_OF_QUESTION:
        if name not in form.reads and not is_empty(row.get(name)) and not _is_within(row[name], turns):
            return (
                f"has a field {name!r}, which is not read and changes the question; write it into {form.question!r}, "
                "or remove it"
            )
    return None


def refused_field(name: str) -> str | None:
    """Describes a field that no format reads and no row may have."""
    return f"has a field {name!r}, which is not read: {REFUSED[name]}" if name in REFUSED else None


def _problem_beside_turns(row: dict, name: str, form: Format, turns: Sequence[dict]) -> str | None:
    value = row[name]
    if name in _REASONING:
        return f"has a field {name!r}, which is not read: {_REASONING[name]}"
    is_conversation = name in _CONVERSATION or (name in TURN_FIELDS and holds_turns(value))
    if is_conversation and not _repeats(name, row, form, turns):
        shown = form.turns or form.answers[0]
        return f"has {name!r} beside {shown!r}, which is the conversation already; keep one of them"
    if form.question and name in _PART_OF_QUESTION and (problem := question_problem(row, form, turns)):
        return problem
    if name == "label" and _is_false(value):
        return f"has 'label' {value!r}, the mark of an answer that is not wanted; remove the row, or the field"
    if name in ("weight", "loss_weight") and value not in (1, "1", "1.0"):
        return f"has {name!r} {value!r} as a row; write it into the turns of its answers, or remove it"
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


def _repeats(name: str, row: dict, form: Format, turns: Sequence[dict]) -> bool:
    """Whether a field repeats a turn or the whole conversation.

    A rejected answer beside a conversation that is the chosen one (UltraFeedback) is no second conversation either.
    """
    value = row["chosen"] if name in ("rejected", "reject") and row.get("chosen") else row[name]
    if isinstance(value, str):
        return value.strip() in {str(turn.get("content")).strip() for turn in turns}
    if not isinstance(value, list):
        return False
    return value in [row[name] for name in form.main] or [_text_of(turn) for turn in value] == [
        _text_of(turn) for turn in turns
    ]


def _is_within(value: Any, turns: list[dict]) -> bool:
    return isinstance(value, str) and any(value.strip() in str(turn.get("content")) for turn in turns)


def _text_of(turn: Any) -> Any:
    return turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn


def _is_false(value: Any) -> bool:
    return value in (0, "0") or (isinstance(value, str) and value.strip().lower() == "false")  # 0 == False
