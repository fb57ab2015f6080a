"""Fixtures of the tests of exporting: a run to merge, and a copy of it to change."""

from merging import lora_copy, lora_run  # noqa: F401
