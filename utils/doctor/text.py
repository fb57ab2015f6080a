"""Checks of a single text: broken Unicode, invisible characters, script."""

import functools
import re
import unicodedata

# ------------------------------------------------------------------ broken Unicode

# what the bytes 0x80 to 0xbf look like in Windows-1252 and Latin-1, and the bytes that begin two, three or four
_CONTINUES = "\x80-\xbf" + "".join(
    bytes([byte]).decode("cp1252", "ignore") for byte in range(0x80, 0xA0)
)  # fmt: skip
_MOJIBAKE = re.compile(f"[\xc2-\xdf][{_CONTINUES}]|[\xe0-\xef][{_CONTINUES}]{{2}}|[\xf0-\xf4][{_CONTINUES}]{{3}}")


def mojibake(text: str) -> str | None:
    """Finds the first piece of UTF-8 decoded as Windows-1252 or Latin-1, with its original: `"Ã©"` → `"'Ã©' for 'é'"`.

    Two letters, as in a French `"Â«"`, happen to be right now and then; only what means a letter, a quotation mark or
    the like again counts.
    """
    for match in _MOJIBAKE.finditer(text):
        try:
            meant = b"".join(map(_byte, match[0])).decode()
        except UnicodeError:
            continue
        if unicodedata.category(meant)[0] in "LPSZ" or meant == "\ufeff":
            return f"{match[0]!r} for {meant!r}"
    return None


def _byte(character: str) -> bytes:
    return bytes([ord(character)]) if ord(character) < 0x100 else character.encode("cp1252")


def broken_unicode(text: str) -> str | None:
    """Returns what is broken in a text's Unicode; None if nothing is."""
    if text.isascii():
        return None
    if "\ufffd" in text:
        return "U+FFFD, which stands for what could not be read"
    return mojibake(text)


# ------------------------------------------------------------------ invisible characters

_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# soft hyphen, zero width, direction marks, fillers, tags; C1 controls
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u115f\u1160\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064"
    "\u2066-\u206f\u3164\ufeff\uffa0\U000e0001\U000e0020-\U000e007f]"
    # joiners belong to Arabic, Persian and Indic letters, and to emoji
    "|(?<![\u0600-\u08ff\u0900-\u0dff\u1000-\u109f\u1780-\u17ff\u2600-\u27bf\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff])"
    "[\u200c\u200d]"
)
_TAGGED_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007f]+")  # the flags of England, Scotland and Wales
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
_MARKS = ("\u200e", "\u200f")  # left-to-right and right-to-left mark


def invisible(text: str) -> str | None:
    """Returns the code and the name of the first invisible character: `"U+200B ZERO WIDTH SPACE"`."""
    pattern = _CONTROLS if text.isascii() else _INVISIBLE
    if not pattern.search(text):
        return None
    may_mark = bool(_RIGHT_TO_LEFT.search(text))
    for match in pattern.finditer(_TAGGED_FLAG.sub("", text)):
        if not (may_mark and match[0] in _MARKS):
            return f"U+{ord(match[0]):04X} {unicodedata.name(match[0], 'CONTROL CHARACTER')}"
    return None


# ------------------------------------------------------------------ scripts

# script → where its letters stand, and how much one of them says: one of Han about as much as three of an alphabet
_SCRIPTS = {
    "Latin": (((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF)), 1),
    "Han": (((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x3134F)), 3),
    "Kana": (((0x3041, 0x3096), (0x30A1, 0x30FA)), 3),
    "Hangul": (((0xAC00, 0xD7A3),), 2),
    "Cyrillic": (((0x400, 0x52F),), 1),
    "Greek": (((0x370, 0x3FF),), 1),
    "Arabic": (((0x620, 0x6FF), (0x750, 0x77F)), 1),
    "Hebrew": (((0x5D0, 0x5EA),), 1),
    "Devanagari": (((0x900, 0x97F),), 1),
    "Bengali": (((0x980, 0x9FF),), 1),
    "Tamil": (((0xB80, 0xBFF),), 1),
    "Thai": (((0xE00, 0xE7F),), 1),
}
SCRIPTS = ("none", *_SCRIPTS)  # a script's number is its place here
_LATIN, _HAN, _KANA = map(SCRIPTS.index, ("Latin", "Han", "Kana"))
_ENOUGH = 2000  # characters that tell a text's script
_LETTER = re.compile("[A-Za-z]")


@functools.cache
def _script_table():
    """Returns the script of each code point, [0x32000] of uint8, and the weights of scripts, [scripts]."""
    import numpy

    table = numpy.zeros(0x32000, numpy.uint8)
    for number, (ranges, _) in enumerate(_SCRIPTS.values(), 1):
        for first, last in ranges:
            table[first : last + 1] = number
    return table, numpy.array([0, *(weight for _, weight in _SCRIPTS.values())])


def script_of(text: str) -> int:
    """Returns the script of most of a text, as an index of `SCRIPTS`; 0 without letters.

    A Japanese text has more Han than Kana; where the Kana are a tenth of both, it counts as Kana.
    """
    text = text[:_ENOUGH]
    if text.isascii():
        return _LATIN if _LETTER.search(text) else 0
    import numpy

    table, weights = _script_table()
    codes = numpy.frombuffer(text.encode("utf-32-le", "replace"), numpy.uint32)
    counts = numpy.bincount(table[numpy.minimum(codes, len(table) - 1)], minlength=len(weights)) * weights
    if counts[_KANA] * 10 >= counts[_KANA] + counts[_HAN] > 0:
        counts[_KANA] += counts[_HAN]
        counts[_HAN] = 0
    return int(counts.argmax()) if counts.any() else 0
