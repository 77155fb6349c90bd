"""Bytes to JSON tokens, one state machine, split anywhere.

The grammar is RFC 8259's with QEMU's additions: strings may stand in single quotes and escape those, and
any run of lower-case letters is a keyword (the parser knows which exist). Escapes and UTF-8 are the
parser's business too. A byte that fits nowhere is a lexical error; what follows is skipped up to a
structural character, a control character other than TAB, 0xFE or 0xFF, which are read as new input.

Shape:    each byte is looked at once, in the state its predecessors led to. A long token comes as parts
          of PART_LENGTH bytes, then the token with what is left; put together they are its text.
"""

import enum
import re
from collections.abc import Iterator

from blockd.units import KIB

PART_LENGTH = 4 * KIB
# Of a lexical error's text; the rest of it would only come back to the client that sent it.
STRAY_LENGTH_MAX = 1024


class Kind(enum.Enum):
    """What a token is."""

    __hash__ = object.__hash__  # Enum's own is written in Python

    OPEN_OBJECT = b"{"
    CLOSE_OBJECT = b"}"
    OPEN_ARRAY = b"["
    CLOSE_ARRAY = b"]"
    COLON = b":"
    COMMA = b","
    STRING = "string"
    INTEGER = "integer"
    FLOAT = "float"
    KEYWORD = "keyword"
    STRAY = "lexical error"
    STRING_PART = "of a string"
    PART = "of a number or keyword"


class _State(enum.IntEnum):
    START = 0
    RECOVERY = enum.auto()
    DOUBLE_QUOTED = enum.auto()
    DOUBLE_QUOTED_ESCAPE = enum.auto()
    SINGLE_QUOTED = enum.auto()
    SINGLE_QUOTED_ESCAPE = enum.auto()
    MINUS = enum.auto()
    ZERO = enum.auto()
    DIGITS = enum.auto()
    POINT = enum.auto()
    FRACTION = enum.auto()
    EXPONENT = enum.auto()
    EXPONENT_SIGN = enum.auto()
    EXPONENT_DIGITS = enum.auto()
    KEYWORD = enum.auto()


_STRINGS = {
    _State.DOUBLE_QUOTED,
    _State.DOUBLE_QUOTED_ESCAPE,
    _State.SINGLE_QUOTED,
    _State.SINGLE_QUOTED_ESCAPE,
}

Token = tuple[Kind, bytes]
# Where a byte leads: the next state, the kind of the token it completes, whether it is used up.
_Step = tuple[_State, Kind | None, bool]

_DIGIT = range(ord("0"), ord("9") + 1)
_NONZERO = range(ord("1"), ord("9") + 1)
_LOWER = range(ord("a"), ord("z") + 1)
_CONTROL = range(0x20)
_IN_STRING = range(0x20, 0xFE)
_STRUCTURAL = [kind for kind in Kind if isinstance(kind.value, bytes)]


def _row(steps: list[tuple[bytes | range, _Step]], otherwise: _Step) -> list[_Step]:
    """Make one state's table of 256 steps; later entries win."""
    row = [otherwise] * 256
    for some_bytes, step in steps:
        for byte in some_bytes:
            row[byte] = step
    return row


def _to(state: _State) -> _Step:
    return (state, None, True)


def _completes(kind: Kind) -> _Step:
    return (_State.START, kind, True)


def _ends_before(kind: Kind | None) -> _Step:
    """End the token without using up the byte."""
    return (_State.START, kind, False)


_FAILS: _Step = (_State.RECOVERY, Kind.STRAY, True)


def _steps() -> dict[_State, list[_Step]]:
    at = _State
    structural = [(kind.value, _completes(kind)) for kind in _STRUCTURAL]
    exponent = (b"eE", _to(at.EXPONENT))
    return {
        at.START: _row(
            [
                *structural,
                (b" \t\r\n", _to(at.START)),
                (b'"', _to(at.DOUBLE_QUOTED)),
                (b"'", _to(at.SINGLE_QUOTED)),
                (b"-", _to(at.MINUS)),
                (b"0", _to(at.ZERO)),
                (_NONZERO, _to(at.DIGITS)),
                (_LOWER, _to(at.KEYWORD)),
            ],
            _FAILS,
        ),
        at.RECOVERY: _row(
            [
                (_CONTROL, _ends_before(None)),
                (b"\t", _to(at.RECOVERY)),
                (b"{}[]:,\xfe\xff", _ends_before(None)),
            ],
            _to(at.RECOVERY),
        ),
        at.DOUBLE_QUOTED: _row(
            [
                (_IN_STRING, _to(at.DOUBLE_QUOTED)),
                (b"\\", _to(at.DOUBLE_QUOTED_ESCAPE)),
                (b'"', _completes(Kind.STRING)),
            ],
            _FAILS,
        ),
        at.DOUBLE_QUOTED_ESCAPE: _row([(_IN_STRING, _to(at.DOUBLE_QUOTED))], _FAILS),
        at.SINGLE_QUOTED: _row(
            [
                (_IN_STRING, _to(at.SINGLE_QUOTED)),
                (b"\\", _to(at.SINGLE_QUOTED_ESCAPE)),
                (b"'", _completes(Kind.STRING)),
            ],
            _FAILS,
        ),
        at.SINGLE_QUOTED_ESCAPE: _row([(_IN_STRING, _to(at.SINGLE_QUOTED))], _FAILS),
        at.MINUS: _row([(b"0", _to(at.ZERO)), (_NONZERO, _to(at.DIGITS))], _FAILS),
        at.ZERO: _row([(_DIGIT, _FAILS), (b".", _to(at.POINT))], _ends_before(Kind.INTEGER)),
        at.DIGITS: _row(
            [(_DIGIT, _to(at.DIGITS)), (b".", _to(at.POINT)), exponent], _ends_before(Kind.INTEGER)
        ),
        at.POINT: _row([(_DIGIT, _to(at.FRACTION))], _FAILS),
        at.FRACTION: _row([(_DIGIT, _to(at.FRACTION)), exponent], _ends_before(Kind.FLOAT)),
        at.EXPONENT: _row([(b"+-", _to(at.EXPONENT_SIGN)), (_DIGIT, _to(at.EXPONENT_DIGITS))], _FAILS),
        at.EXPONENT_SIGN: _row([(_DIGIT, _to(at.EXPONENT_DIGITS))], _FAILS),
        at.EXPONENT_DIGITS: _row([(_DIGIT, _to(at.EXPONENT_DIGITS))], _ends_before(Kind.FLOAT)),
        at.KEYWORD: _row([(_LOWER, _to(at.KEYWORD))], _ends_before(Kind.KEYWORD)),
    }


def _run_pattern(state: _State, row: list[_Step]) -> re.Pattern[bytes]:
    """Match the bytes that leave a state as it is, whole escapes included."""
    staying = b"".join(re.escape(bytes([byte])) for byte in range(256) if row[byte] == _to(state))
    run = b"[" + staying + b"]*+" if staying else b""
    if state in (_State.DOUBLE_QUOTED, _State.SINGLE_QUOTED):
        run += rb"(?:\\[\x20-\xfd]" + run + b")*+"
    return re.compile(run)


_STEPS = _steps()
_WHOLE_TOKENS: dict[int, Token] = {kind.value[0]: (kind, kind.value) for kind in _STRUCTURAL}
_RUNS = {state: _run_pattern(state, row) for state, row in _STEPS.items()}


class Lexer:
    """Cut a stream of bytes into tokens."""

    def __init__(self) -> None:
        self._state = _State.START
        self._token = bytearray()
        # The beginning of a token whose parts are given away, for the text of an error.
        self._head = b""

    def feed(self, data: bytes) -> Iterator[Token]:
        """Take the next bytes of the stream and yield the tokens they complete.

        A number or keyword is complete when the byte after it is there. Exhaust the iterator before the
        next call.
        """
        position = 0
        while position < len(data):
            if self._state is _State.START and data[position] in _WHOLE_TOKENS:
                yield _WHOLE_TOKENS[data[position]]  # not needed for the result, but for speed
                position += 1
                continue
            position = self._run(data, position)
            if len(self._token) >= PART_LENGTH:
                yield self._part()
            elif position < len(data):
                state, kind, is_used = _STEPS[self._state][data[position]]
                if is_used:
                    self._token.append(data[position])
                    position += 1
                if kind:
                    yield self._end_token(kind)
                self._state = state
                if state <= _State.RECOVERY:
                    self._token.clear()

    def _run(self, data: bytes, position: int) -> int:
        """Pass the bytes that do not change the state, as far as a part may grow."""
        room = PART_LENGTH - len(self._token)
        run = _RUNS[self._state].match(data, position, position + room)
        assert run is not None
        if self._state > _State.RECOVERY:
            self._token += run[0]
        return run.end()

    def _part(self) -> Token:
        text = bytes(self._token)
        self._token.clear()
        self._head += text[: STRAY_LENGTH_MAX - len(self._head)]
        return Kind.STRING_PART if self._state in _STRINGS else Kind.PART, text

    def _end_token(self, kind: Kind) -> Token:
        text = self._head + self._token if kind is Kind.STRAY else bytes(self._token)
        self._token.clear()
        self._head = b""
        return kind, text
