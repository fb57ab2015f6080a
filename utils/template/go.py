"""A template in Go's text/template syntax, as Ollama evaluates it.

Ollama calls the template with `.Messages`, each with `.Role` and `.Content`, system messages among them; one role's
messages in a row reach it joined to one. It evaluates the template for a prompt, so the opening of an answer ends it;
where an assistant's message stands last, that answer is to be gone on with and stays open.

Ollama cuts a conversation that is too long from its front, so that it may begin with an answer. Such turns are
rendered as they come; only a system message that the format has no place for is refused.
"""

# what `str.strip` removes, by the number of bytes in UTF-8: Go's `slice` counts bytes, and there is no trim function
_SPACES = {
    1: "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f ",
    2: "\x85\xa0",
    3: "\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000",
}


def to_go(template, leave_out: str = "") -> str:
    """Writes a `Template` as a Go template with the same rendering.

    Args:
        template: utils.template.format.Template
        leave_out: the BOS token, where the program that tokenises adds it by itself. A rendering that begins with it
            is written without; two would be one more than was trained.

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
    parts.append("{{ end }}")
    opening = literal(template.assistant)
    parts.append('{{ if and $last (ne .Role "assistant") }}' + opening + "{{ end }}" if opening else "")
    return "".join(parts) + "{{ end }}"


def _system(template) -> str:
    if template.system is not None:
        return _wrapped(template, template.system, ".Content")
    if template.system_with_user is not None:
        return "{{ $system = .Content }}{{ $waits = true }}"
    # an index that is a text: the error that Go then makes shows it
    return "{{ index $.Messages " + quoted(f"the format {template.name} has no system message") + " }}"


def _user(template, form: str, folds: bool) -> str:
    turn = _wrapped(template, form, ".Content")
    if not folds:
        return turn
    before, rest = template.system_with_user.split("{system}")
    middle, after = rest.split("{content}")
    whole = f"(print {quoted(before)} $system {quoted(middle)} .Content {quoted(after)})"
    joined = _wrapped(template, form, whole)
    return "{{ if $waits }}" + joined + "{{ $waits = false }}{{ else }}" + turn + "{{ end }}"


def _wrapped(template, form: str, expression: str) -> str:
    before, after = form.split("{content}")
    return literal(before) + _content(template, expression) + literal(after)


def _content(template, expression: str) -> str:
    return '{{ template "strip" ' + expression + " }}" if template.strip else "{{ " + expression + " }}"


def literal(text: str) -> str:
    """A text as it stands, or as a Go string where the template's or the Modelfile's syntax would take it for its own.

    `"<|im_start|>"` → `"<|im_start|>"`, `"{{"` → `'{{ "{{" }}'`
    """
    plain = all(char.isprintable() or char == "\n" for char in text)
    return text if plain and "{" not in text and '"' not in text else "{{ " + quoted(text) + " }}"


def quoted(text: str) -> str:
    """`'a"\\n'` → `"a\\"\\n"`, a string of Go on one line and of printed characters alone."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char == "\n":
        return "\\n"
    return char if char.isprintable() else f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def _strip() -> str:
    """A template that says a text without the spaces around it, by calling itself with one less."""
    cases = []
    for size, chars in _SPACES.items():
        spaces = " ".join(map(quoted, chars))
        # `slice . n` is a text less its first n bytes, so its length is where the last n begin
        for end, rest in (
            (f"(slice . 0 {size})", f"(slice . {size})"),
            (f"(slice . (len (slice . {size})))", f"(slice . 0 (len (slice . {size})))"),
        ):
            condition = f"and (ge (len .) {size}) (eq {end} {spaces})"
            cases.append("if " + condition + ' }}{{ template "strip" ' + rest + " }}")
    return '{{ define "strip" }}{{ ' + "{{ else ".join(cases) + "{{ else }}{{ . }}{{ end }}{{ end }}"


_STRIP = _strip()
