"""Reading many pieces of a file with few system calls.

What is between two pieces is read as well if it is little, and forgotten: that costs less than another call.
"""

import os
from typing import Final

from blockd.block.node import ProtocolNode
from blockd.units import KIB

# What one call takes (Linux: UIO_MAXIOV).
VECTOR_COUNT_MAX: Final = 1024
# A call costs as much as reading a few pages.
GAP_LENGTH_MAX: Final = 16 * KIB

Piece = tuple[int, memoryview]

# For what nobody needs; whatever is written there at once by several threads.
_nowhere: Final = memoryview(bytearray(GAP_LENGTH_MAX))


class FileReads(ProtocolNode):
    """A node with an open file: many pieces of it are read with few calls."""

    _fd: int

    def read_pieces_blocking(self, pieces: list[Piece]) -> None:
        super().read_pieces_blocking(read_together(self._fd, pieces))


def read_together(fd: int, pieces: list[Piece]) -> list[Piece]:
    """Read those pieces that are near each other; returns those that are not read yet, or not for sure."""
    left: list[Piece] = []
    first = 0
    while first < len(pieces):
        last, vectors = _neighbours(pieces, first)
        if last - first == 1 or not _is_read(fd, pieces[first][0], vectors):
            left += pieces[first:last]
        first = last
    return left


def _neighbours(pieces: list[Piece], first: int) -> tuple[int, list[memoryview]]:
    """How far the pieces are near each other, and the memory for them and for what is between them."""
    offset, buffer = pieces[first]
    vectors, end = [buffer], offset + len(buffer)
    for number in range(first + 1, len(pieces)):
        offset, buffer = pieces[number]
        gap = offset - end
        if not 0 <= gap <= GAP_LENGTH_MAX or len(vectors) > VECTOR_COUNT_MAX - 2:
            return number, vectors
        if gap:
            vectors.append(_nowhere[:gap])
        vectors.append(buffer)
        end = offset + len(buffer)
    return len(pieces), vectors


def _is_read(fd: int, offset: int, vectors: list[memoryview]) -> bool:
    """Whether all of it is read; if not, who reads it piece by piece finds out why."""
    try:
        return os.preadv(fd, vectors, offset) == sum(map(len, vectors))
    except OSError:
        return False
