"""Doing what a read plan says: many small pieces in one thread hop."""

from blockd.aio import in_thread
from blockd.block.node import BlockingSource, Buffer, Segment

# A hop costs some 50 µs; zeroes below this size are cheaper shared than made.
_ZEROES = bytes(64 * 1024)


def zeroes(length: int) -> Buffer:
    """A read-only buffer of zeroes."""
    return _ZEROES[:length] if length <= len(_ZEROES) else bytes(length)


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
    buffer = bytearray(length)
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
    for segment in segments:
        target = buffer[position : position + segment.length]
        if isinstance(segment.source, BlockingSource):
            segment.source.readinto_blocking(segment.offset, target)
        else:
            target[:] = zeroes(segment.length)
        position += segment.length
