"""Chat formats as data: how a conversation is rendered, which of its tokens are trained.

A new format is one `register_template(...)` call in `catalogue`. In reading order: catalogue, format,
messages, tokenize, auto, reading, derived, spans, hidden_fields, jinja, go, tool_template, with_source.
"""

from utils.template.catalogue import get_template, register_template, template_dict, unknown_template
from utils.template.format import Template
from utils.template.messages import Message

__all__ = ["Message", "Template", "get_template", "register_template", "template_dict", "unknown_template"]
