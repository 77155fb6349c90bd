"""JSON values to bytes, as QEMU writes them: ASCII only, `", "` and `": "`, lines end in CRLF."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TypeAlias

from blockd.units import KIB
from blockd.wire.qmp import LongText, Value

_INDENT = 4
_PLAIN = re.compile(r"[ !#-\[\]-~]*")
_SPECIAL = re.compile(r"[^ !#-\[\]-~]")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}

# About as much as one step of `pack_pieces` makes; a string is escaped in slices of it.
PIECE_LENGTH = 4 * KIB

# What is left of a container: of each value what stands before it and its key; and the closing bracket.
_Open: TypeAlias = tuple[Iterator[tuple[str, str | None, Value]], str]


def pack_message(message: Value, *, pretty: bool = False) -> bytes:
    """Write one message as a line, or as several, indented ones."""
    return b"".join(pack_pieces(message, pretty=pretty))


def pack_pieces(message: Value, *, pretty: bool = False) -> Iterator[bytes]:
    """Yield one message in pieces, so that others can have a turn while a large one is written."""
    parts: list[str] = []
    length = 0
    for part in _parts(message, pretty):
        parts.append(part)
        length += len(part)
        if length >= PIECE_LENGTH:
            yield _encoded(parts)
            parts.clear()
            length = 0
    yield _encoded([*parts, "\n"])


def _encoded(parts: list[str]) -> bytes:
    return "".join(parts).replace("\n", "\r\n").encode("ascii")


def _parts(message: Value, pretty: bool) -> Iterator[str]:
    """Yield the text of a value piece by piece; no recursion, for a client's id may be 1,024 deep."""
    stack: list[_Open] = [(iter([("", None, message)]), "")]
    while stack:
        values, closing = stack[-1]
        for separator, key, value in values:
            yield separator
            if key is not None:
                yield from _string(key)
                yield ": "
            if isinstance(value, dict | list):
                yield "{" if isinstance(value, dict) else "["
                stack.append(_open(value, len(stack), pretty))
                break
            yield from _string(value) if isinstance(value, str | LongText) else (_literal(value),)
        else:
            stack.pop()
            yield closing


def _open(container: dict[str, Value] | list[Value], depth: int, pretty: bool) -> _Open:
    newline = "\n" + " " * (_INDENT * depth) if pretty else ""
    outer_newline = "\n" + " " * (_INDENT * (depth - 1)) if pretty else ""
    if isinstance(container, dict):
        return _separated(iter(container.items()), newline), outer_newline + "}"
    return _separated(((None, value) for value in container), newline), outer_newline + "]"


def _separated(
    values: Iterator[tuple[str, Value]] | Iterator[tuple[None, Value]], newline: str
) -> Iterator[tuple[str, str | None, Value]]:
    separator = newline
    for key, value in values:
        yield separator, key, value
        separator = "," + (newline or " ")


def _literal(value: float | bool | None) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:.17g}"
    return str(value)


def _string(text: str | LongText) -> Iterable[str]:
    slices: Iterator[str]
    if isinstance(text, LongText):
        slices = (slice_ for part in text.parts for slice_ in _slices(part.decode()))
    elif len(text) <= PIECE_LENGTH:
        return (f'"{_escaped(text)}"',)
    else:
        slices = _slices(text)
    return chain('"', map(_escaped, slices), '"')


def _slices(text: str) -> Iterator[str]:
    return (text[start : start + PIECE_LENGTH] for start in range(0, len(text), PIECE_LENGTH))


def _escaped(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else _SPECIAL.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    if character in _ESCAPES:
        return _ESCAPES[character]
    if 0xD800 <= code < 0xE000 or 0xFDD0 <= code < 0xFDF0 or code & 0xFFFE == 0xFFFE:
        return "\\uFFFD"  # no character
    if code <= 0xFFFF:
        return f"\\u{code:04X}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"
