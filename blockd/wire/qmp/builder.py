"""JSON tokens to a value, one token at a time, with QEMU's words for the first mistake.

The stack holds the containers that are open. `_expected` says what may come next; every value that is
complete, from a literal to a closed container, goes through `_complete`, which knows what it was for.
"""

import enum

from blockd.wire.qmp import LongText, Value
from blockd.wire.qmp.lexer import Kind
from blockd.wire.qmp.text import LongString, unquote

# Of an error's text; QEMU cuts there too.
ERROR_LENGTH_MAX = 1023
_INT64_MIN, _UINT64_END = -(1 << 63), 1 << 64
# The longest a 64-bit integer can be.
_INTEGER_DIGITS_MAX = 20
_KEYWORDS: dict[bytes, Value] = {b"true": True, b"false": False, b"null": None}


class _Next(enum.Enum):
    """What may come next in an open container."""

    __hash__ = object.__hash__  # Enum's own is written in Python

    FIRST_KEY = enum.auto()
    KEY = enum.auto()
    COLON = enum.auto()
    MEMBER_VALUE = enum.auto()
    MEMBER_END = enum.auto()
    FIRST_ELEMENT = enum.auto()
    ELEMENT = enum.auto()
    ELEMENT_END = enum.auto()


# Where something else than punctuation is an error; elsewhere it is the punctuation that is.
_ERRORS = {
    _Next.COLON: "missing : in object pair",
    _Next.MEMBER_END: "expected separator in dict",
    _Next.ELEMENT_END: "expected separator in list",
}
_PUNCTUATION = {
    (Kind.COLON, _Next.COLON): _Next.MEMBER_VALUE,
    (Kind.COMMA, _Next.MEMBER_END): _Next.KEY,
    (Kind.COMMA, _Next.ELEMENT_END): _Next.ELEMENT,
}
_CLOSING = {
    (Kind.CLOSE_OBJECT, _Next.FIRST_KEY),
    (Kind.CLOSE_OBJECT, _Next.MEMBER_END),
    (Kind.CLOSE_ARRAY, _Next.FIRST_ELEMENT),
    (Kind.CLOSE_ARRAY, _Next.ELEMENT_END),
}


class _Open:
    """A container that is not closed yet."""

    __slots__ = ("container", "key", "next")

    def __init__(self, container: dict[str, Value] | list[Value], first: _Next) -> None:
        self.container = container
        self.next = first
        self.key = ""


class Builder:
    """Build one value: `value` is it when the last token was added, unless there is an `error`."""

    def __init__(self) -> None:
        self.value: Value = None
        self.error: str | None = None
        self._stack: list[_Open] = []
        # The long token that is arriving.
        self._string: LongString | None = None
        self._parts = bytearray()

    def add(self, kind: Kind, text: bytes) -> None:
        """Take the next token or part of one; after an error the rest is ignored."""
        if self.error is not None:
            return
        try:
            self._add(kind, text)
        except ValueError as error:
            self.error = str(error)
            self._stack.clear()

    def _add(self, kind: Kind, text: bytes) -> None:
        top = self._stack[-1] if self._stack else None
        if top and (kind, top.next) in _CLOSING:
            self._stack.pop()
            self._complete(top.container)
        elif top and (kind, top.next) in _PUNCTUATION:
            top.next = _PUNCTUATION[kind, top.next]
        elif top and top.next in _ERRORS:
            raise ValueError(_ERRORS[top.next])
        elif kind is Kind.OPEN_OBJECT:
            self._stack.append(_Open({}, _Next.FIRST_KEY))
        elif kind is Kind.OPEN_ARRAY:
            self._stack.append(_Open([], _Next.FIRST_ELEMENT))
        elif kind is Kind.STRING_PART:
            self._string = self._string or LongString()
            self._string.add(text)
        elif kind is Kind.PART:
            self._parts += text
        else:
            self._complete(self._scalar(kind, text))

    def _scalar(self, kind: Kind, text: bytes) -> Value:
        """Put the parts of a long token together, if there are any."""
        if self._string is not None:
            string, self._string = self._string, None
            return string.finish(text)
        if self._parts:
            text = bytes(self._parts + text)
            self._parts.clear()
        return _literal(kind, text)

    def _complete(self, value: Value) -> None:
        """Put a complete value where it belongs."""
        if not self._stack:
            self.value = value
            return
        top = self._stack[-1]
        if isinstance(top.container, list):
            top.container.append(value)
            top.next = _Next.ELEMENT_END
        elif top.next is _Next.MEMBER_VALUE:
            if top.key in top.container:
                raise ValueError("duplicate key")
            top.container[top.key] = value
            top.next = _Next.MEMBER_END
        elif isinstance(value, str):
            top.key = value
            top.next = _Next.COLON
        else:
            is_long = isinstance(value, LongText)
            raise ValueError("key is too long" if is_long else "key is not a string in object")


def _literal(kind: Kind, text: bytes) -> Value:
    match kind:
        case Kind.STRING:
            return unquote(text)
        case Kind.INTEGER:
            return _number(text)
        case Kind.FLOAT:
            return float(text)
        case Kind.KEYWORD if text in _KEYWORDS:
            return _KEYWORDS[text]
        case Kind.KEYWORD:
            raise ValueError(f"invalid keyword '{text[:ERROR_LENGTH_MAX].decode()}'"[:ERROR_LENGTH_MAX])
    raise ValueError("expecting value")


def _number(text: bytes) -> int | float:
    """Take what fits 64 bits, signed or unsigned, as an integer, and the rest as a double."""
    if len(text) <= _INTEGER_DIGITS_MAX:
        value = int(text)
        if _INT64_MIN <= value < _UINT64_END:
            return value
    return float(text)
