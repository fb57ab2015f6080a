"""The day that a chat template prints: that of the run, so that rows are the same on the next day."""

import contextlib
from datetime import datetime
from unittest.mock import patch


def today() -> str:
    """The day by this machine's clock: `2026-01-31`."""
    return datetime.now().date().isoformat()


def prints_date(tokenizer) -> bool:
    """Whether a chat template of the tokenizer's prints the day on which it renders."""
    own = tokenizer.chat_template
    return any("strftime_now" in text for text in (own.values() if isinstance(own, dict) else [own or ""]))


class _StoppedClock:
    """Stands for `datetime.datetime`, of which a template only sees `now()`."""

    def __init__(self, day: str):
        self._day = day

    def now(self) -> datetime:
        return datetime.fromisoformat(self._day)


def on_day(day: str):
    """Renders chat templates as transformers does at midnight of `day`; as it does now where `day` is empty.

    `strftime_now` of a template calls `datetime.now()` of transformers' module, and no argument can replace it.
    """
    from transformers.utils import chat_template_utils

    return patch.object(chat_template_utils, "datetime", _StoppedClock(day)) if day else contextlib.nullcontext()
