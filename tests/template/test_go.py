"""A `Template` in Go's syntax, as text; tests/export/test_modelfile.py has Go evaluate it."""

import pytest

from utils.template.format import Template
from utils.template.go import _STRIP, literal, quoted, to_go


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a"\n', r'"a\"\n"'), ("\\", r'"\\"'), ("\t", r'"\u0009"'), ("好", '"好"'), ("\U000e0001", r'"\U000e0001"'),
        ("", '""'),
    ],
)  # fmt: skip
def test_quoted_strings_are_one_printable_line(text, expected):
    assert quoted(text) == expected


def test_a_text_is_quoted_only_where_it_holds_syntax():
    assert literal("<|im_start|>user\n") == "<|im_start|>user\n"
    assert literal("{{") == '{{ "{{" }}'
    assert literal('say "hi"') == r'{{ "say \"hi\"" }}'
    assert literal("\x0b") == r'{{ "\u000b" }}'


CHATML = {"user": "<u>{content}</u>", "assistant": "<a>", "stop": "</a>"}
HEAD = '{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}{{ if eq .Role "system" }}'
USER = '{{ else if eq .Role "user" }}'
ANSWER = '{{ else if eq .Role "assistant" }}<a>{{ .Content }}{{ if not $last }}</a>{{ end }}'
END = '{{ else }}{{ index $.Messages "the format t has no turn for this role in a Modelfile" }}'
END += '{{ end }}{{ if and $last (ne .Role "assistant") }}<a>{{ end }}{{ end }}'


def test_a_template_with_turns_for_all_roles():
    template = Template("t", "", (), bos="<s>", system="<s>{content}</s>", **CHATML)
    system, user = "<s>{{ .Content }}</s>", "<u>{{ .Content }}</u>"
    assert to_go(template) == "<s>" + HEAD + system + USER + user + ANSWER + END
    assert to_go(template, leave_out="<s>") == HEAD + system + USER + user + ANSWER + END


def test_a_default_system_message_comes_before_a_first_user():
    template = Template("t", "", (), system="<s>{content}</s>", default_system="Be brief.", **CHATML)
    default = '{{ if and (eq $i 0) (ne .Role "system") }}<s>Be brief.</s>{{ end }}'
    assert default + '{{ if eq .Role "system" }}<s>{{ .Content }}</s>' in to_go(template)


def test_a_system_message_without_a_place_makes_go_raise():
    assert '{{ index $.Messages "the format t has no system message" }}' in to_go(Template("t", "", (), **CHATML))


def test_a_bos_that_opens_each_user_turn_is_left_out_of_the_first_alone():
    found = to_go(Template("t", "", (), system="{content}", **CHATML), leave_out="<u>")
    assert "{{ if $begun }}<u>{{ .Content }}</u>{{ else }}{{ .Content }}</u>{{ end }}{{ $begun = true }}" in found
    assert found.startswith("{{ $begun := false }}")


def test_contents_are_stripped_by_a_template_of_their_own():
    found = to_go(Template("t", "", (), strip=True, **CHATML))
    assert found.startswith(_STRIP) and found.count('{{ template "strip" .Content }}') == 2
    assert "{{ .Content }}" not in found.removeprefix(_STRIP)
