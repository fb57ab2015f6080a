"""Chat formats as data: how a conversation is rendered, which of its tokens are trained.

A new format is one `register_template(...)` call in `catalogue`. In reading order: catalogue, registry, format,
messages, tokenize, auto, dates, reading, derived, spans, hidden_fields, jinja, go, jinja_template, thinking,
with_source.
"""

from utils.template import catalogue  # noqa: F401  registers the formats
from utils.template.format import Template
from utils.template.messages import Message
from utils.template.registry import get_run_template, get_template, register_template, template_dict, unknown_template

__all__ = [
    "Message", "Template", "get_run_template", "get_template", "register_template", "template_dict", "unknown_template",
]  # fmt: skip
