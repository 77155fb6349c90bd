"""JSON strings: escapes, and UTF-8 as QEMU has it.

U+0000 may be written as the two bytes C0 80; Unicode's noncharacters and surrogates are not characters.
A long string is taken in parts, each cut where neither an escape nor a character is torn apart.
"""

import re

from blockd.units import MIB
from blockd.wire.qmp import LongText

# Bytes of UTF-8; what is longer becomes a LongText.
TEXT_LENGTH_MAX = MIB

_PLANES = range(0, 0x110000, 0x10000)
_NO_CHARACTER = re.compile(
    "[\ud800-\udfff\ufdd0-\ufdef"
    + "".join(f"{chr(plane | 0xFFFE)}{chr(plane | 0xFFFF)}" for plane in _PLANES)
    + "]"
)
# One sequence of the shape its first byte promises, complete or not, or a byte that starts none.
_SEQUENCE = re.compile(
    rb"[\x00-\x7f]+"
    rb"|[\xc0-\xdf][\x80-\xbf]?"
    rb"|[\xe0-\xef][\x80-\xbf]{0,2}"
    rb"|[\xf0-\xf7][\x80-\xbf]{0,3}"
    rb"|[\xf8-\xfb][\x80-\xbf]{0,4}"
    rb"|[\xfc\xfd][\x80-\xbf]{0,5}"
    rb"|[\x80-\xbf\xfe\xff]"
)
_ESCAPE = re.compile(
    rb"\\u([Dd][89ABab][0-9A-Fa-f]{2})\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\.", re.DOTALL
)
# Bytes that can be understood without those that follow: some characters and escapes. No more of them at
# once, as `re` notes where it could go back to. A possessive group, which would not, takes too little in
# Python 3.11.2, which is Debian 12's.
_WHOLE = re.compile(
    rb"(?:[^\\\xc0-\xff]+"
    rb"|[\xc0-\xff](?:[\x80-\xbf]{5}|[\x80-\xbf]{0,4}(?=[^\x80-\xbf]))"
    rb"|\\[^u]"
    rb"|\\u(?![Dd][89ABab]).{4}"
    rb"|\\u[Dd][89ABab].{2}(?:\\u.{4}|(?=[^\\]|\\[^u]))"
    rb"){1,256}",
    re.DOTALL,
)
_SIMPLE_ESCAPES = {
    b'\\"': b'"', b"\\'": b"'", b"\\\\": b"\\", b"\\/": b"/",
    b"\\b": b"\b", b"\\f": b"\f", b"\\n": b"\n", b"\\r": b"\r", b"\\t": b"\t",
}  # fmt: skip
# `\uXXXX`: what an error text shows of one that is none.
_UNICODE_ESCAPE_LENGTH = 6


def decode(data: bytes) -> str:
    """Decode UTF-8.

    Raises:   ValueError: not valid.
    """
    if b"\xc0\x80" in data:
        data = data.replace(b"\xc0\x80", b"\0")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError("invalid UTF-8 sequence in string") from error
    if not text.isascii() and _NO_CHARACTER.search(text):
        raise ValueError("invalid UTF-8 sequence in string")
    return text


def decode_lossy(data: bytes) -> str:
    """Decode UTF-8 for an error text: U+FFFD stands for each invalid sequence, NUL ends it."""
    return "".join(_sequence_text(match[0]) for match in _SEQUENCE.finditer(data.partition(b"\0")[0]))


def _sequence_text(sequence: bytes) -> str:
    try:
        return decode(sequence)
    except ValueError:
        return "\ufffd"


def unquote(token: bytes) -> str:
    """Return the text of a string token, which is quoted and has no bare quote inside.

    Raises:   ValueError: an escape or the UTF-8 is invalid; the first such place, in QEMU's words.
    """
    return _text(token[1:])[:-1]


class LongString:
    """A string token that arrives in parts; each is checked when it is there.

    Raises:   ValueError: like `unquote`.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0
        # What may belong together with bytes that are still to come.
        self._rest = b""

    def add(self, part: bytes) -> None:
        """Take what is not the end."""
        data = self._rest + part
        end = 0
        while whole := _WHOLE.match(data, end):
            end = whole.end()
        self._rest = data[end:]
        self._keep(_text(data[:end]))

    def finish(self, part: bytes) -> str | LongText:
        """Take the end, with the closing quote, and return the whole."""
        self._keep(_text(self._rest + part)[:-1])
        self._parts[0] = self._parts[0][1:]  # the opening quote
        if self._length - 1 > TEXT_LENGTH_MAX:
            return LongText(tuple(self._parts))
        return b"".join(self._parts).decode()

    def _keep(self, text: str) -> None:
        data = text.encode()
        self._parts.append(data)
        self._length += len(data)


def _text(data: bytes) -> str:
    if b"\\" in data:
        data = _ESCAPE.sub(_unescape, data)
    return decode(data)


def _unescape(match: re.Match[bytes]) -> bytes:
    escape, (high, low, single) = match[0], match.groups()
    if escape in _SIMPLE_ESCAPES:
        return _SIMPLE_ESCAPES[escape]
    if high:
        character = chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF))
    elif single:
        character = chr(int(single, 16))
    else:
        raise _escape_error(match)
    if _NO_CHARACTER.match(character):
        raise _escape_error(match)
    return character.encode()


def _escape_error(match: re.Match[bytes]) -> ValueError:
    """Say what is wrong first: something before the escape, or the escape."""
    text, start = match.string, match.start()
    decode(text[:start])
    if text[start + 1 : start + 2] != b"u":
        return ValueError("invalid escape sequence in string")
    shown = text[start : max(match.end(), start + _UNICODE_ESCAPE_LENGTH)]
    return ValueError(f"{decode_lossy(shown)} is not a valid Unicode character")
