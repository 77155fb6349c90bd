"""Copying for a fill: clone, or read, look for zeroes, write; one thread hop for all of it.

Every format fills the same way and differs in where the copy goes. So a part of the range comes with
a function that tells where in the file it goes, when it is known that it goes anywhere.

Where files can share blocks (reflink), clusters that lie whole in one segment of the source are cloned. They
are not looked at for zeroes: that would mean to read them, and zeroes that are shared take no space.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import NamedTuple

from blockd.aio import in_thread
from blockd.block.copy_memory import LENGTH, copy_memory
from blockd.block.node import BlockNode, Buffer, ProtocolNode, Segment, Source
from blockd.block.segments import can_read_blocking, clipped, read_segments, readinto_segments_blocking
from blockd.block.zero_clusters import zero_clusters
from blockd.units import KIB, align_down, align_up

# With less than this cloned at a time, copying is faster (and the file is in fewer pieces).
CLONE_LENGTH_MIN = 64 * KIB

# Fills a buffer with what the guest finds from an offset on.
Read = Callable[[int, memoryview], None]
# Where clusters of a part go: from a position in it and a length to a host offset, and how much goes there.
Place = Callable[[int, int], tuple[int, int]]


class Part(NamedTuple):
    """Neighbouring clusters of the guest that are copied at once; the last one may end where the disk does.

    `place` is asked at most once for each of them. `host_offset`: where all of them go, if that is settled.
    """

    offset: int
    length: int
    place: Place
    host_offset: int | None = None

    @classmethod
    def at(cls, offset: int, length: int, host_offset: int) -> "Part":
        """A part whose clusters are neighbours in the file, too."""
        return cls(offset, length, lambda position, count: (host_offset + position, count), host_offset)


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


class Target(NamedTuple):
    """The file that parts are copied into.

    `keep_cached`: they will be read soon, so they go through the page cache, and are not cloned.
    """

    file: ProtocolNode
    cluster_size: int
    keep_cached: bool

    async def copy(self, parts: list[Part], offset: int, source: list[Segment]) -> set[int]:
        """Copy the source, which begins at guest offset `offset`, into the parts.

        Clusters that are all zeroes are not written, unless they are cloned; returns their guest offsets.
        What the source lacks at the end of the last cluster is zeroes.

        Cancel:   takes effect when nothing is written any more.
        """
        zero_clusters: set[int] = set()
        left: list[Part] = []
        for part in parts:
            found = await self._copy_apart(part, clipped(source, part.offset - offset, part.length))
            if found is None:
                left.append(part)
            else:
                zero_clusters.update(found)
        if left:
            read = await source_reader(offset, source)
            zero_clusters |= await in_thread(self._copy_parts_blocking, left, offset, source, read)
        return zero_clusters

    async def _copy_apart(self, part: Part, source: list[Segment]) -> list[int] | None:
        """Let the file copy a part apart from this process; None: it does not.

        Tells the offsets of clusters that are all zeroes.
        """
        if part.host_offset is None or self.keep_cached or not self.file.copies_apart:
            return None
        await asyncio.sleep(0)  # guests have their turn: getting here took as long as one of their requests
        positions = await self.file.copy_apart(source, part.host_offset, part.length, self.cluster_size)
        return None if positions is None else [part.offset + position for position in positions]

    def split(
        self, start: int, end: int, source_offset: int, source: list[Segment]
    ) -> Iterator[tuple[int, int, Segment | None]]:
        """Split a range of clusters by whether they can be cloned, from the segment that is told.

        `source_offset`: where the plan begins.
        """
        rest = position = start
        for segment in clipped(source, start - source_offset, end - start):
            low = align_up(position, self.cluster_size)
            high = align_down(position + segment.length, self.cluster_size)
            offset = segment.offset + low - position
            position += segment.length
            if high - low >= CLONE_LENGTH_MIN and self._can_clone(segment.source, offset):
                if rest < low:
                    yield rest, low, None
                yield low, high, Segment(high - low, segment.source, offset)
                rest = high
        if rest < end:
            yield rest, end, None

    def _can_clone(self, source: Source | None, offset: int) -> bool:
        if self.keep_cached or source is None:
            return False
        return self.file.can_clone_blocking(source, offset, self.cluster_size)

    def clone_blocking(self, segment: Segment, host_offset: int) -> bool:
        """Clone what `split` has told, or a part of it that is whole clusters."""
        assert segment.source is not None, "zeroes are not cloned"
        return self.file.clone_blocking(segment.source, segment.offset, host_offset, segment.length)

    def write_blocking(self, host_offset: int, data: Buffer) -> None:
        write = self.file.write_blocking if self.keep_cached else self.file.write_cold_blocking
        write(host_offset, data)

    def write_part_blocking(self, part: Part, position: int, data: memoryview) -> None:
        """Write whole clusters to where they go."""
        while data:
            host_offset, length = part.place(position, len(data))
            self.write_blocking(host_offset, data[:length])
            position, data = position + length, data[length:]

    def _copy_parts_blocking(
        self, parts: list[Part], offset: int, source: list[Segment], read: Read
    ) -> set[int]:
        zero_clusters: set[int] = set()
        for part in parts:
            for start, end, segment in self.split(part.offset, part.offset + part.length, offset, source):
                if segment is not None:
                    self._clone_blocking(part, start, segment, read)
                else:
                    zero_clusters.update(self._copy_blocking(part, start, end, read))
        return zero_clusters

    def _copy_blocking(self, part: Part, offset: int, end: int, read: Read) -> Iterator[int]:
        """Copy a range of clusters of a part; yields the offsets of those that are all zeroes."""
        piece_length = max(LENGTH, self.cluster_size)
        for start in range(offset, end, piece_length):
            length = min(piece_length, end - start)
            with copy_memory.lent(length) as buffer:
                read(start, buffer)
                for position, data in self._data(buffer):
                    if data:
                        self.write_part_blocking(part, start - part.offset + position, data)
                    else:
                        yield start + position

    def _data(self, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Split clusters into runs that are not all zeroes, and single ones that are, told as nothing."""
        start = 0
        for cluster in zero_clusters(buffer, self.cluster_size):
            if start < cluster:
                yield start, buffer[start:cluster]
            yield cluster, buffer[:0]
            start = cluster + self.cluster_size
        if start < len(buffer):
            yield start, buffer[start:]

    def _clone_blocking(self, part: Part, offset: int, segment: Segment, read: Read) -> None:
        """Clone a range of clusters of a part; copy what cannot be cloned after all."""
        end = offset + segment.length
        while offset < end:
            host_offset, length = part.place(offset - part.offset, end - offset)
            [first] = clipped([segment], segment.length - (end - offset), length)
            if not self.clone_blocking(first, host_offset):
                with copy_memory.lent(length) as buffer:
                    read(offset, buffer)
                    self.write_blocking(host_offset, buffer)
            offset += length
