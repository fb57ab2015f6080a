"""What the doctor sees in a text, and what it leaves alone."""

import pytest

from utils.doctor.text import SCRIPTS, broken_unicode, invisible, script_of

TEXTS = ["café", "你好", "“Quoted” – naïve…", "Привет", "こんにちは", "São Paulo", "€ 5", "𝒳"]


def _misread(text: str, encoding: str) -> str | None:
    try:
        return text.encode().decode(encoding)
    except UnicodeDecodeError:  # Windows-1252 has no character for five bytes
        return None


@pytest.mark.parametrize("text", TEXTS)
def test_utf8_read_as_another_encoding_is_broken(text):
    assert broken_unicode(text) is None
    misread = [broken for encoding in ("latin-1", "cp1252") if (broken := _misread(text, encoding))]
    assert misread
    for broken in misread:
        assert broken_unicode(f"It says {broken} here")


@pytest.mark.parametrize("text", ["Ã", "Â", "PÂTÉ", "Â 5", "25 °C ± 1", "ÎÏÐ", "åäö ÅÄÖ", "× ÷ ½", "Ã£", "naïve"])
def test_letters_that_only_look_like_it(text):
    # "Ã£" is "ã" read wrongly, and nothing else
    assert (broken_unicode(text) is None) == (text != "Ã£")


def test_replacement_character():
    assert "U+FFFD" in broken_unicode("a\ufffdb")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a\u200bb", "U+200B ZERO WIDTH SPACE"),
        ("\ufeffa", "U+FEFF ZERO WIDTH NO-BREAK SPACE"),
        ("a\u202eb", "U+202E RIGHT-TO-LEFT OVERRIDE"),
        ("a\u2066b", "U+2066 LEFT-TO-RIGHT ISOLATE"),
        ("a\x07b", "U+0007 CONTROL CHARACTER"),
        ("é\x00", "U+0000 CONTROL CHARACTER"),
        ("a\u200db", "U+200D ZERO WIDTH JOINER"),
        ("a\u200eb", "U+200E LEFT-TO-RIGHT MARK"),
        ("a\U000e0041b", "U+E0041 TAG LATIN CAPITAL LETTER A"),
    ],
)
def test_invisible_characters(text, name):
    assert invisible(text) == name


@pytest.mark.parametrize(
    "text",
    [
        "line\n\tline\r\n",
        "no\u00a0break",
        "👨\u200d👩\u200d👧",
        "می\u200cخواهم",
        "क्\u200dष",
        "שלום\u200f!",
        "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    ],
)
def test_characters_that_belong_there(text):
    assert invisible(text) is None


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello", "Latin"),
        ("Où est-il ?", "Latin"),
        ("你好，GPT", "Han"),
        ("東京はどこですか", "Kana"),
        ("Привет, GPT", "Cyrillic"),
        ("안녕하세요", "Hangul"),
        ("123 + 4", "none"),
        ("", "none"),
        ("😀", "none"),
    ],
)
def test_script_of(text, script):
    assert SCRIPTS[script_of(text)] == script
