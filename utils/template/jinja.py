"""Writes a `Template` as a Jinja chat template for transformers' `apply_chat_template`."""


def to_jinja(template) -> str:
    """Writes a `Template` as a Jinja chat template with the same rendering.

    `{% generation %}` marks what is trained: `apply_chat_template(..., return_assistant_tokens_mask=True)` returns
    the same mask as our labels.

    Args:
        template: utils.template.format.Template

    Returns:
        the text for `tokenizer.chat_template`.
    """
    parts = [_checks(template), _literal(template.bos), "{% for message in messages %}"]
    if template.default_system is not None:
        default = _literal(template.system.replace("{content}", template.default_system))
        parts.append("{% if loop.first and message['role'] != 'system' %}" + default + "{% endif %}")
    content = _content(template, "message['content']")
    parts += [
        "{% if message['role'] == 'assistant' %}",
        _literal(template.assistant + template.before_answer),
        "{% generation %}{{ " + content + " }}" + _literal(template.after_answer + template.stop),
        "{% endgeneration %}" + _literal(template.after_stop),
    ]
    if template.system is not None:
        parts.append("{% elif message['role'] == 'system' %}" + _wrapped(template.system, content))
    parts.append("{% elif message['role'] == 'user' %}")
    if template.system_with_user is not None:
        before, middle, after = _split(template.system_with_user)
        head = f"{quoted(before)} ~ messages[0]['content'] ~ {quoted(middle)}"
        if template.keep_system:
            joined = f"{head} ~ ({content}) ~ {quoted(after)}"
        else:
            joined = _content(template, f"({head} ~ message['content'] ~ {quoted(after)})")
        parts.append("{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}" + _wrapped(template.user, joined))
        parts.append("{% else %}" + _wrapped(template.user, content) + "{% endif %}")
    else:
        parts.append(_wrapped(template.user, content))
    parts.append("{% endif %}{% endfor %}{% if add_generation_prompt %}" + _literal(template.assistant))
    parts.append("{% else %}" + _literal(template.end) + "{% endif %}")
    return "".join(parts)


def _checks(template) -> str:
    """Writes the checks of `Template.check`, which raise an exception."""
    has_system = template.system is not None or template.system_with_user is not None
    roles = ["user", "assistant", *(["system"] if has_system else [])]
    text = "{% for message in messages %}{% if message['role'] not in " + repr(roles) + " %}"
    text += _refuse(f"{template.name}: no such role: ", "message['role']") + "{% endif %}"
    if template.system is None and has_system:
        text += "{% if message['role'] == 'system' and (not loop.first or messages | length < 2 "
        text += "or messages[1]['role'] != 'user') %}"
        text += _refuse(f"{template.name}: a system message only at the start, before a user") + "{% endif %}"
    if template.system_at_start:
        text += "{% if message['role'] == 'system' and not loop.first %}"
        text += _refuse(f"{template.name}: a system message only at the start") + "{% endif %}"
    text += "{% endfor %}"
    if template.alternate:
        text += "{% for message in messages | rejectattr('role', 'equalto', 'system') %}"
        text += "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        text += _refuse("user and assistant must take turns, a user first") + "{% endif %}{% endfor %}"
    return text


def _refuse(message: str, more: str | None = None) -> str:
    return "{{ raise_exception(" + quoted(message) + (f" ~ {more}" if more else "") + ") }}"


def _split(form: str) -> tuple[str, str, str]:
    before, rest = form.split("{system}")
    middle, after = rest.split("{content}")
    return before, middle, after


def _content(template, expression: str) -> str:
    return f"{expression} | trim" if template.strip else expression


def _wrapped(form: str, content: str) -> str:
    before, after = form.split("{content}")
    return _literal(before) + "{{ " + content + " }}" + _literal(after)


def _literal(text: str) -> str:
    """Writes a text as an expression, since Jinja drops a line feed after a block: `"a\\n"` → `"{{ 'a\\n' }}"`."""
    return "{{ " + quoted(text) + " }}" if text else ""


def quoted(text: str) -> str:
    """Quotes a text as a Jinja string: `"a\n"` → `"'a\\n'"`."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
