"""Copying for a fill: read, look for zeroes, write; one thread hop for all of it.

Every format fills the same way and differs in where the copy goes. So a part of the range comes with
a function that writes to it, and only that function knows about host offsets. What may go from file to
file without being touched here does (passing.py).
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from blockd.aio import in_thread
from blockd.block.node import BlockNode, ProtocolNode, Segment
from blockd.block.segments import can_read_blocking, clipped, read_segments, readinto_segments_blocking
from blockd.formats.passing import pass_pages
from blockd.units import align_down, align_up

# What writing past the page cache asks of memory.
MEMORY_ALIGNMENT = 4096

# Fills a buffer with what the guest finds from an offset on.
Read = Callable[[int, memoryview], None]

_scratch = threading.local()


class Part(NamedTuple):
    """Neighbouring clusters of the guest that are copied at once.

    `write` takes a position in the part, and whole clusters that are to be written there. `pages_to`:
    in which file that is, and where the part begins there, if pages may be passed there as they are.
    """

    offset: int
    length: int
    write: Callable[[int, memoryview], None]
    pages_to: tuple[ProtocolNode, int] | None = None


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
    read = await source_reader(offset, source)
    if not can_read_blocking(source):
        parts = [part._replace(pages_to=None) for part in parts]
    return await in_thread(_copy_blocking, cluster_size, parts, offset, source, read)


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


def _copy_blocking(
    cluster_size: int, parts: list[Part], offset: int, source: list[Segment], read: Read
) -> set[int]:
    zero_clusters: set[int] = set()
    for part in parts:
        position = 0
        if part.pages_to is not None:
            stored = clipped(source, part.offset - offset, part.length)
            position = _pass_pages(part, part.pages_to, stored, cluster_size, zero_clusters)
        if position < part.length:
            _copy_rest(cluster_size, part, position, read, zero_clusters)
    return zero_clusters


def _pass_pages(
    part: Part,
    target: tuple[ProtocolNode, int],
    stored: list[Segment],
    cluster_size: int,
    zero_clusters: set[int],
) -> int:
    """Pass pages from the part's start as far as that can be; returns up to where."""
    zeroes: set[int] = set()
    position = pass_pages(*target, stored, cluster_size, zeroes)
    zero_clusters.update(part.offset + position for position in zeroes)
    return position


def _copy_rest(cluster_size: int, part: Part, position: int, read: Read, zero_clusters: set[int]) -> None:
    """Read and write a part from `position` on."""
    length = part.length - position
    buffer, first = _scratch_buffer(length)
    view = memoryview(buffer)[first : first + length]
    read(part.offset + position, view)
    start = 0
    for cluster in _zero_clusters(buffer, first, length, cluster_size):
        zero_clusters.add(part.offset + position + cluster)
        if start < cluster:
            part.write(position + start, view[start:cluster])
        start = cluster + cluster_size
    if start < length:
        part.write(position + start, view[start:])


def _zero_clusters(buffer: bytearray, first: int, length: int, cluster_size: int) -> Iterator[int]:
    """The positions of all-zero clusters; comparing stops at the first byte that differs."""
    zero_cluster = bytes(cluster_size)
    for position in range(0, length, cluster_size):
        if buffer.startswith(zero_cluster, first + position):
            yield position


def _scratch_buffer(length: int) -> tuple[bytearray, int]:
    """This thread's buffer, and where in it an aligned part of `length` bytes begins.

    Kept, because memory that was used before is much faster than new memory.
    """
    scratch: tuple[bytearray, int] | None = getattr(_scratch, "buffer", None)
    if scratch is None or len(scratch[0]) < length + MEMORY_ALIGNMENT:
        buffer = bytearray(length + MEMORY_ALIGNMENT)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        scratch = _scratch.buffer = (buffer, -address % MEMORY_ALIGNMENT)
    return scratch
