"""Copying for a fill: read, look for zeroes, write; one thread hop for all of it.

Every format fills the same way and differs in where the copy goes. So a part of the range comes with
a function that writes to it, and only that function knows about host offsets.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from blockd.aio import in_thread
from blockd.block.node import BlockNode, Segment
from blockd.block.segments import can_read_blocking, clipped, read_segments, readinto_segments_blocking
from blockd.formats.copy_memory import copy_memory
from blockd.units import align_down, align_up

# Fills a buffer with what the guest finds from an offset on.
Read = Callable[[int, memoryview], None]


class Part(NamedTuple):
    """Neighbouring clusters of the guest that are copied at once.

    `write` takes a position in the part, and whole clusters that are to be written there.
    """

    offset: int
    length: int
    write: Callable[[int, memoryview], None]


def split_zeroes(
    image: BlockNode, start: int, end: int, source_offset: int, source: list[Segment]
) -> Iterator[tuple[int, int, bool]]:
    """Split a range of clusters of `image` by whether the source plan says that they are all zeroes.

    `source_offset`: where the plan begins. The last cluster may end behind the disk's end.
    """
    position = start
    for segment in clipped(source, start - source_offset, end - start):
        segment_end = start + segment.length
        start = segment_end
        if segment.source is not None:
            continue
        zero_start = align_up(segment_end - segment.length, image.cluster_size)
        is_last = segment_end >= image.size
        zero_end = end if is_last else align_down(segment_end, image.cluster_size)
        if zero_start < zero_end:
            if position < zero_start:
                yield position, zero_start, False
            yield zero_start, zero_end, True
            position = zero_end
    if position < end:
        yield position, end, False


async def copy_parts(cluster_size: int, parts: list[Part], offset: int, source: list[Segment]) -> set[int]:
    """Copy the source, which begins at guest offset `offset`, into the parts.

    Clusters that are all zeroes are not written; returns their guest offsets. What the source lacks at
    the end of the last cluster is zeroes.

    Cancel:   takes effect when the thread is done.
    """
    return await in_thread(_copy_blocking, cluster_size, parts, await source_reader(offset, source))


async def source_reader(offset: int, source: list[Segment]) -> Read:
    """A function for threads that reads the source by guest offset; past its end there are zeroes.

    `offset`: where in the guest's disk the source begins.
    """
    length = sum(segment.length for segment in source)
    data: memoryview | None = None
    can_read = can_read_blocking(source)
    if not can_read:
        data = memoryview(await read_segments(source, length))

    def read(start: int, buffer: memoryview) -> None:
        stored = max(0, min(len(buffer), offset + length - start))
        if data is not None:
            buffer[:stored] = data[start - offset : start - offset + stored]
        else:
            readinto_segments_blocking(clipped(source, start - offset, stored), buffer[:stored])
        buffer[stored:] = bytes(len(buffer) - stored)

    return read


def _copy_blocking(cluster_size: int, parts: list[Part], read: Read) -> set[int]:
    zero_clusters: set[int] = set()
    for part in parts:
        with copy_memory.lent(part.length) as buffer:
            read(part.offset, buffer)
            start = 0
            for cluster in _zero_clusters(buffer, cluster_size):
                zero_clusters.add(part.offset + cluster)
                if start < cluster:
                    part.write(start, buffer[start:cluster])
                start = cluster + cluster_size
            if start < part.length:
                part.write(start, buffer[start:])
    return zero_clusters


def _zero_clusters(buffer: memoryview, cluster_size: int) -> Iterator[int]:
    """The positions of all-zero clusters; comparing stops at the first byte that differs."""
    zero_cluster = bytes(cluster_size)
    for position in range(0, len(buffer), cluster_size):
        if zero_cluster.startswith(buffer[position : position + cluster_size]):
            yield position
