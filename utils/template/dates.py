"""The date in a rendering: today's, or a fixed one, so that rows are the same tomorrow."""

import contextlib
from datetime import datetime
from unittest.mock import patch


def today() -> str:
    """The day by this machine's clock: `2026-01-31`."""
    return datetime.now().date().isoformat()


def shows_date(tokenizer) -> bool:
    """Whether a chat template of the tokenizer shows the day on which it is rendered."""
    own = tokenizer.chat_template
    return any("strftime_now" in text for text in (own.values() if isinstance(own, dict) else [own or ""]))


class _FixedClock:
    """Replaces `datetime.datetime`, of which chat templates only use `now()`."""

    def __init__(self, day: str):
        self._day = day

    def now(self) -> datetime:
        return datetime.fromisoformat(self._day)


def fixed_date(day: str):
    """Returns a context in which chat templates show `day`, so that rows are the same tomorrow; no change if empty.

    The `strftime_now` of a template calls `datetime.now()` of transformers' module, and no argument replaces it.
    """
    from transformers.utils import chat_template_utils

    return patch.object(chat_template_utils, "datetime", _FixedClock(day)) if day else contextlib.nullcontext()
