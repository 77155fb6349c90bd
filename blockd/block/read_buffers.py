"""Memory for what is read, used again as soon as nobody holds it any more.

Fresh memory is filled with zeroes before a file is read into it, and it is cold: for 1 MiB that costs
about as much as the reading. Nobody has to say when a buffer is no longer needed: the interpreter
counts who holds it, a socket that still sends it and views of its parts included.
"""

import sys

from blockd.units import KIB, MIB

# Smaller ones are cheaper to make than to look for.
LENGTH_MIN = 32 * KIB
# Kept in all; a longer buffer is not kept.
KEPT_SIZE_MAX = 8 * MIB
KEPT_COUNT_MAX = 32


class ReadBuffers:
    """Buffers of any lengths; used by the event loop alone."""

    def __init__(self) -> None:
        self._kept: list[bytearray] = []
        self._kept_size = 0

    def get(self, length: int) -> bytearray:
        """A buffer of exactly `length` bytes with anything in it; the caller's until nobody holds it."""
        if length < LENGTH_MIN:
            return bytearray(length)
        kept = self._kept
        for index in range(len(kept)):
            if len(kept[index]) == length and _holder_count(kept, index) == _UNHELD:
                return kept[index]
        return self._new(length)

    def _new(self, length: int) -> bytearray:
        """Make a buffer and keep it, instead of the oldest ones where there are too many."""
        buffer = bytearray(length)
        if length <= KEPT_SIZE_MAX:
            self._kept.append(buffer)
            self._kept_size += length
        while self._kept_size > KEPT_SIZE_MAX or len(self._kept) > KEPT_COUNT_MAX:
            self._kept_size -= len(self._kept.pop(0))
        return buffer


def _holder_count(kept: list[bytearray], index: int) -> int:
    """How many hold a buffer, in the interpreter's way of counting."""
    return sys.getrefcount(kept[index])


# What is counted where nobody holds the buffer but the list.
_UNHELD = _holder_count([bytearray()], 0)

# Those of all reads.
read_buffers = ReadBuffers()
