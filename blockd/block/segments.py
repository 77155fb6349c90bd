"""Doing what a read plan says: many small pieces in one thread hop."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter

from blockd.aio import in_thread
from blockd.block.node import BlockingSource, Buffer, Segment
from blockd.block.read_buffers import read_buffers
from blockd.extents import Range

# A hop costs some 50 µs; zeroes below this size are cheaper shared than made.
_ZEROES = bytes(64 * 1024)


def zeroes(length: int) -> Buffer:
    """A read-only buffer of zeroes."""
    return _ZEROES[:length] if length <= len(_ZEROES) else bytes(length)


class SourcePlan:
    """Where some ranges of a disk are stored; parts of them are found in a few steps.

    What is asked for is inside one range, or reaches over its end: there is nothing there.
    """

    def __init__(self, offset: int = 0, segments: Iterable[Segment] = ()) -> None:
        self.segments: list[Segment] = []
        self._starts: list[int] = []
        # How much there is before each segment, and in the end of all.
        self._positions = [0]
        self._has_zeroes = False
        self.add(offset, segments)

    def add(self, offset: int, segments: Iterable[Segment]) -> None:
        """Have a range that begins at `offset`, behind those that are there."""
        for segment in segments:
            self.segments.append(segment)
            self._starts.append(offset)
            self._positions.append(self._positions[-1] + segment.length)
            offset += segment.length
            if segment.source is None:
                self._has_zeroes = True

    @property
    def length(self) -> int:
        """How much all of it is."""
        return self._positions[-1]

    @property
    def has_zeroes(self) -> bool:
        """Whether it says of any part that it is zeroes."""
        return self._has_zeroes

    def position(self, offset: int) -> int:
        """How much there is before `offset`."""
        number = bisect_right(self._starts, offset) - 1
        return self._positions[number] + offset - self._starts[number]

    def part(self, start: int, end: int) -> list[Segment]:
        """The segments of a range, cut to it."""
        first = bisect_right(self._starts, start) - 1
        last = bisect_left(self._starts, end, first + 1)
        part = self.segments[first:last]
        if not part:
            return part
        excess = self._starts[last - 1] + part[-1].length - end
        if excess > 0:
            length, source, offset = part[-1]
            part[-1] = Segment(length - excess, source, offset)
        if (cut := start - self._starts[first]) > 0:
            length, source, offset = part[0]
            part[0] = Segment(length - cut, source, offset + cut)
        return part if part[0].length > 0 else []

    def gathered(self, ranges: Iterable[Range]) -> "SourcePlan":
        """A plan, from 0 on, of these ranges one behind the other."""
        return SourcePlan(0, [segment for start, end in ranges for segment in self.part(start, end)])


def clipped(segments: list[Segment], offset: int, length: int) -> list[Segment]:
    """Cut the part at `offset` (counted from the first segment's start) of `length` bytes out of a plan."""
    part: list[Segment] = []
    end = offset + length
    start = 0
    for segment in segments:
        low, high = max(offset, start), min(end, start + segment.length)
        if low < high:
            part.append(Segment(high - low, segment.source, segment.offset + low - start))
        start += segment.length
    return part


async def read_segments(segments: list[Segment], length: int) -> Buffer:
    """Read a whole plan of `length` bytes; in one thread hop where that can be."""
    assert sum(map(itemgetter(0), segments)) == length, "all is read: the memory was used before"
    buffer = read_buffers.get(length)
    if can_read_blocking(segments):
        await in_thread(readinto_segments_blocking, segments, memoryview(buffer))
        return buffer
    position = 0
    for segment in segments:
        target = memoryview(buffer)[position : position + segment.length]
        if isinstance(segment.source, BlockingSource):
            await in_thread(segment.source.readinto_blocking, segment.offset, target)
        elif segment.source is not None:
            target[:] = await segment.source.read(segment.offset, segment.length)
        else:
            target[:] = zeroes(segment.length)
        position += segment.length
    return buffer


def can_read_blocking(segments: list[Segment]) -> bool:
    """Whether a thread can read this plan by itself."""
    return all(segment.source is None or isinstance(segment.source, BlockingSource) for segment in segments)


def readinto_segments_blocking(segments: list[Segment], buffer: memoryview) -> None:
    """Read a plan into `buffer`.

    Needs:    `can_read_blocking(segments)`.
    """
    position = 0
    for source, same in groupby(segments, itemgetter(1)):
        pieces: list[tuple[int, memoryview]] = []
        for length, _, offset in same:
            pieces.append((offset, buffer[position : position + length]))
            position += length
        if isinstance(source, BlockingSource):
            source.read_pieces_blocking(pieces)
        else:
            for _, target in pieces:
                target[:] = zeroes(len(target))
