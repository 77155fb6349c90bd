"""A stream of bytes to a stream of JSON values and parse errors.

A message ends where its brackets balance, wherever that is; no newline is needed. What is wrong in it is
reported once, at its end; a lexical error ends it at once. One that exceeds a limit is reported at once,
and what is left of it is skipped. The value is built while its tokens arrive, so that no message, however
large, is work for one moment.
"""

from blockd.units import MIB
from blockd.wire.qmp import Message, ParseError
from blockd.wire.qmp.builder import Builder
from blockd.wire.qmp.lexer import STRAY_LENGTH_MAX, Kind, Lexer
from blockd.wire.qmp.text import decode_lossy

MESSAGE_LENGTH_MAX = 64 * MIB
TOKEN_COUNT_MAX = 2 << 20
NESTING_MAX = 1024
# A longer one could not be converted in a moment.
NUMBER_LENGTH_MAX = MIB


class JsonReader:
    """Read the messages of one client."""

    def __init__(self) -> None:
        self._lexer = Lexer()
        # Past a limit: nothing is kept of the message any more.
        self._is_refused = False
        self._start_message()

    def feed(self, data: bytes) -> list[Message]:
        """Take the next bytes of the stream and return the messages they complete."""
        messages: list[Message] = []
        for kind, text in self._lexer.feed(data):
            if kind is Kind.STRAY:
                stray = decode_lossy(text[:STRAY_LENGTH_MAX])
                messages.append(ParseError(f"JSON parse error, stray '{stray}'"))
                self._start_message()
                continue
            self._count(kind, text)
            if self._is_refused:
                pass
            elif error := self._limit_exceeded():
                messages.append(ParseError(error))
                self._is_refused = True
                self._builder = Builder()  # lets go of what it has
            else:
                self._builder.add(kind, text)
            if self._is_complete(kind):
                if not self._is_refused:
                    messages.append(self._result())
                self._start_message()
        return messages

    def _start_message(self) -> None:
        self._builder = Builder()
        self._braces = self._brackets = 0
        self._length = self._token_count = self._part_length = 0
        self._is_refused = False

    def _count(self, kind: Kind, text: bytes) -> None:
        self._length += len(text)
        if kind is Kind.PART:
            self._part_length += len(text)
        elif kind is not Kind.STRING_PART:
            self._token_count += 1
            self._part_length = 0
            if kind in _DEPTH:
                braces, brackets = _DEPTH[kind]
                self._braces += braces
                self._brackets += brackets

    def _limit_exceeded(self) -> str | None:
        if self._length + 1 > MESSAGE_LENGTH_MAX or self._part_length > NUMBER_LENGTH_MAX:
            return "JSON token size limit exceeded"
        if self._token_count > TOKEN_COUNT_MAX:
            return "JSON token count limit exceeded"
        if self._braces + self._brackets > NESTING_MAX:
            return "JSON nesting depth limit exceeded"
        return None

    def _is_complete(self, kind: Kind) -> bool:
        """Tell whether the brackets balance, or can no longer."""
        if kind in _PARTS:
            return False
        return (self._braces <= 0 and self._brackets <= 0) or self._braces < 0 or self._brackets < 0

    def _result(self) -> Message:
        error = self._builder.error
        return self._builder.value if error is None else ParseError(f"JSON parse error, {error}")


_PARTS = (Kind.STRING_PART, Kind.PART)
_DEPTH = {
    Kind.OPEN_OBJECT: (1, 0),
    Kind.CLOSE_OBJECT: (-1, 0),
    Kind.OPEN_ARRAY: (0, 1),
    Kind.CLOSE_ARRAY: (0, -1),
}
