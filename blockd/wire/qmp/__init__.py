"""QMP's JSON: bytes to values and back, with QEMU's grammar, limits and error texts."""

from dataclasses import dataclass
from typing import TypeAlias

from blockd.errors import PeerError


@dataclass(frozen=True, slots=True)
class LongText:
    """A string too long to be put together without keeping others waiting; it can only be sent back.

    Shape:    parts of valid UTF-8, cut between characters.
    """

    parts: tuple[bytes, ...]


Value: TypeAlias = "dict[str, Value] | list[Value] | str | LongText | int | float | bool | None"


class ParseError(PeerError):
    """A message that is no JSON; the stream goes on after it."""


Message: TypeAlias = "Value | ParseError"
