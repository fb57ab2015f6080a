"""A template in Go's text/template syntax, as Ollama evaluates it.

Ollama calls the template with `.Messages`, system messages included, each with `.Role` and `.Content`; it joins
consecutive messages of one role beforehand. The rendering is a prompt, so it ends with the opening of an answer; if
the last message is the assistant's, the model continues that answer, which is rendered without its stop token.

Ollama removes the first turns of a conversation that is too long, so it may begin with an answer. Such turns are
rendered like any other; only a role and a system message that the format does not support are refused.
"""

# the characters that `str.strip` removes, by their length in UTF-8: Go's `slice` counts bytes and there is no trim
_SPACES = {
    1: "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f ",
    2: "\x85\xa0",
    3: "\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000",
}


def to_go(template, leave_out: str = "") -> str:
    """Writes a `Template` as a Go template with the same rendering.

    Args:
        template: utils.template.format.Template; only its conversations without tools are rendered.
        leave_out: the BOS token, if the program that tokenises adds it itself. It is then removed from the beginning
            of the rendering, since training had only one.

    Returns:
        the text for a Modelfile's TEMPLATE.
    """
    folds = template.system is None and template.system_with_user is not None
    early = bool(leave_out) and not template.bos and template.user.startswith(leave_out)
    parts = [_STRIP] if template.strip else []
    parts.append(literal(template.bos.removeprefix(leave_out)))
    parts += ['{{ $system := "" }}{{ $waits := false }}'] if folds else []
    parts += ["{{ $begun := false }}"] if early else []
    parts.append("{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}")
    if template.default_system is not None:
        default = literal(template.system.replace("{content}", template.default_system))
        parts.append('{{ if and (eq $i 0) (ne .Role "system") }}' + default + "{{ end }}")
    parts.append('{{ if eq .Role "system" }}' + _system(template))
    user = _user(template, template.user, folds)
    if early:
        first = _user(template, template.user.removeprefix(leave_out), folds)
        user = "{{ if $begun }}" + user + "{{ else }}" + first + "{{ end }}{{ $begun = true }}"
    parts.append('{{ else if eq .Role "user" }}' + user)
    parts.append('{{ else if eq .Role "assistant" }}' + literal(template.assistant + template.before_answer))
    parts.append(_content(template, ".Content"))
    stop = literal(template.after_answer + template.stop + template.after_stop)
    parts.append("{{ if not $last }}" + stop + "{{ end }}" if stop else "")
    parts += ["{{ $begun = true }}"] if early else []
    parts.append("{{ else }}" + _refusal("no turn for this role in a Modelfile", template))
    parts.append("{{ end }}")
    opening = literal(template.assistant)
    parts.append('{{ if and $last (ne .Role "assistant") }}' + opening + "{{ end }}" if opening else "")
    return "".join(parts) + "{{ end }}"


def _system(template) -> str:
    if template.system_at_start:
        later = _refusal("a system message at the start only", template)
        return "{{ if $i }}" + later + "{{ else }}" + _wrapped(template, template.system, ".Content") + "{{ end }}"
    if template.system is not None:
        return _wrapped(template, template.system, ".Content")
    if template.system_with_user is not None:
        return "{{ $system = .Content }}{{ $waits = true }}"
    return _refusal("no system message", template)


def _refusal(has: str, template) -> str:
    # indexing with a text makes Go raise an error that shows the text
    return "{{ index $.Messages " + quoted(f"the format {template.name} has {has}") + " }}"


def _user(template, form: str, folds: bool) -> str:
    turn = _wrapped(template, form, ".Content")
    if not folds:
        return turn
    before, rest = template.system_with_user.split("{system}")
    middle, after = rest.split("{content}")
    if template.keep_system:
        opening, closing = form.split("{content}")
        head = f"{{{{ print {quoted(before)} $system {quoted(middle)} }}}}"
        joined = literal(opening) + head + _content(template, ".Content") + literal(after + closing)
    else:
        joined = _wrapped(template, form, f"(print {quoted(before)} $system {quoted(middle)} .Content {quoted(after)})")
    return "{{ if $waits }}" + joined + "{{ $waits = false }}{{ else }}" + turn + "{{ end }}"


def _wrapped(template, form: str, expression: str) -> str:
    before, after = form.split("{content}")
    return literal(before) + _content(template, expression) + literal(after)


def _content(template, expression: str) -> str:
    return '{{ template "strip" ' + expression + " }}" if template.strip else "{{ " + expression + " }}"


def literal(text: str) -> str:
    """Returns a text unchanged, or as a quoted Go string if it contains syntax of templates or Modelfiles.

    `"<|im_start|>"` → `"<|im_start|>"`, `"{{"` → `'{{ "{{" }}'`
    """
    plain = all(char.isprintable() or char == "\n" for char in text)
    return text if plain and "{" not in text and '"' not in text else "{{ " + quoted(text) + " }}"


def quoted(text: str) -> str:
    """Quotes a text as a Go string on one line, of printable characters only: `'a"\\n'` → `"a\\"\\n"`."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char == "\n":
        return "\\n"
    return char if char.isprintable() else f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def _strip() -> str:
    """Builds a Go template that outputs a text without the spaces around it, by recursion on a text with one less."""
    cases = []
    for size, chars in _SPACES.items():
        spaces = " ".join(map(quoted, chars))
        # `slice . n` drops the first n bytes, so its length is the offset of the last n bytes
        for end, rest in (
            (f"(slice . 0 {size})", f"(slice . {size})"),
            (f"(slice . (len (slice . {size})))", f"(slice . 0 (len (slice . {size})))"),
        ):
            condition = f"and (ge (len .) {size}) (eq {end} {spaces})"
            cases.append("if " + condition + ' }}{{ template "strip" ' + rest + " }}")
    return '{{ define "strip" }}{{ ' + "{{ else ".join(cases) + "{{ else }}{{ . }}{{ end }}{{ end }}"


_STRIP = _strip()
