"""QMP's JSON: bytes to values and back, with QEMU's grammar, limits and error texts."""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class LongText:
    """A string too long to be put together without keeping others waiting; it can only be sent back.

    Shape:    parts of valid UTF-8, cut between characters.
    """

    parts: tuple[bytes, ...]


Value: TypeAlias = "dict[str, Value] | list[Value] | str | LongText | int | float | bool | None"
