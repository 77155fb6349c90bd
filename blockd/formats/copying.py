"""Copying for a fill: clone, or read, look for zeroes, write.

Every format fills the same way and differs in where the copy goes. Where that is told by a function that any
thread may call, or known before, one thread hop does it all (`Target.copy`). Else it takes two, and between
them the event loop finds places for what is to be stored, and no more (`Copy`). Many small ranges are one
part: read with as few calls as there can be, looked at and written as one.

Where files can share blocks (reflink), clusters that lie whole in one segment of the source are cloned. They
are not looked at for zeroes: that would mean to read them, and zeroes that are shared take no space.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from blockd.aio import in_thread
from blockd.block.copy_memory import LENGTH, copy_memory
from blockd.block.node import BlockNode, Buffer, OverlayNode, ProtocolNode, Segment, Source
from blockd.block.segments import (
    SourcePlan,
    can_read_blocking,
    clipped,
    read_segments,
    readinto_segments_blocking,
)
from blockd.block.zero_clusters import zero_clusters
from blockd.extents import Range, total_length
from blockd.units import KIB, align_down, align_up

# With less than this cloned at a time, copying is faster (and the file is in fewer pieces).
CLONE_LENGTH_MIN = 64 * KIB

# Fills a buffer with what a plan has from an offset on.
Read = Callable[[int, memoryview], None]
# Where clusters of a part go: from a position in it and a length to a host offset, and how much goes there.
Place = Callable[[int, int], tuple[int, int]]


class Part(NamedTuple):
    """Clusters of the guest that are copied at once: some ranges, counted as if they were neighbours.

    The last one may end where the disk does. `place` is asked at most once for each cluster. `host_offset`:
    where all of them go, if that is settled.
    """

    ranges: list[Range]
    length: int
    place: Place
    host_offset: int | None = None

    @classmethod
    def at(cls, ranges: list[Range], host_offset: int) -> "Part":
        """A part whose clusters are neighbours in the file."""

        def place(position: int, length: int) -> tuple[int, int]:
            return host_offset + position, length

        return cls(ranges, total_length(ranges), place, host_offset)

    def guest_ranges(self, position: int, length: int) -> Iterator[Range]:
        """Which ranges of the guest a stretch of the part is."""
        if not position and length == self.length:
            yield from self.ranges
            return
        end = position + length
        start = 0
        for low, high in self.ranges:
            low_position, high_position = max(start, position), min(start + high - low, end)
            if low_position < high_position:
                yield low + low_position - start, low + high_position - start
            start += high - low

    def guest_offsets(self, positions: Iterable[int]) -> Iterator[int]:
        """The offsets of what is at these positions, which are in order."""
        ranges = iter(self.ranges)
        start = next_start = low = 0
        for position in positions:
            while position >= next_start:
                low, high = next(ranges)
                start, next_start = next_start, next_start + high - low
            yield low + position - start


async def empty_ranges(image: OverlayNode, ranges: Sequence[Range]) -> list[Range]:
    """What of some ranges the image has nothing for, rounded up to whole clusters at the disk's end."""
    found: list[Range] = []
    empty: list[Range] = []
    number = looked_end = 0  # of what is in `empty`: the first one that may be needed still
    known_count = 0  # so many ranges are done
    is_cut = bool(ranges[-1][1] % image.cluster_size)
    for index, (start, range_end) in enumerate(ranges):
        if index < known_count:
            continue
        offset, end = start, min(range_end, image.size)
        while offset < end:
            if offset >= looked_end:
                length = min(ranges[-1][1], image.size) - offset
                (empty, looked_end), number = await image.unallocated(offset, length), 0
                count = len(empty)
                if count and not is_cut and empty == ranges[index : index + count]:  # as of many most often
                    found += empty
                    known_count, number = index + count, count
                    break
            while number < len(empty) and empty[number][1] <= offset:
                number += 1
            stop = min(end, looked_end)
            if number < len(empty) and empty[number][0] < stop:
                low, high = max(offset, empty[number][0]), min(stop, empty[number][1])
                found.append((low, align_up(high, image.cluster_size)))
                offset = high
            else:
                offset = stop
    return found


def split_zeroes(
    image: BlockNode, ranges: Iterable[Range], source: SourcePlan
) -> Iterator[tuple[int, int, bool]]:
    """Split ranges of clusters of `image` by whether the source plan says that they are all zeroes.

    The last cluster may end behind the disk's end.
    """
    for start, end in ranges:
        if source.has_zeroes:
            yield from _split_range(image, start, end, source)
        else:
            yield start, end, False


def _split_range(
    image: BlockNode, start: int, end: int, source: SourcePlan
) -> Iterator[tuple[int, int, bool]]:
    position = segment_end = start
    for segment in source.part(start, end):
        segment_start, segment_end = segment_end, segment_end + segment.length
        if segment.source is not None:
            continue
        zero_start = align_up(segment_start, image.cluster_size)
        is_last = segment_end >= image.size
        zero_end = end if is_last else align_down(segment_end, image.cluster_size)
        if zero_start < zero_end:
            if position < zero_start:
                yield position, zero_start, False
            yield zero_start, zero_end, True
            position = zero_end
    if position < end:
        yield position, end, False


async def source_reader(source: SourcePlan) -> Read:
    """A function for threads that reads what a plan has; past its end there are zeroes."""
    data: memoryview | None = None
    if not can_read_blocking(source.segments):
        data = memoryview(await read_segments(source.segments, source.length))

    def read(start: int, buffer: memoryview) -> None:
        segments = source.part(start, start + len(buffer))
        stored = sum(segment.length for segment in segments)
        if data is not None and stored:
            position = source.position(start)
            buffer[:stored] = data[position : position + stored]
        elif stored:
            readinto_segments_blocking(segments, buffer[:stored])
        buffer[stored:] = bytes(len(buffer) - stored)

    return read


class PartCopy(NamedTuple):
    """A part, and where its data come from: the plan counts as the part does, from 0 on."""

    part: Part
    source: SourcePlan
    read: Read


class Target(NamedTuple):
    """The file that parts are copied into.

    `keep_cached`: they will be read soon, so they go through the page cache, and are not cloned.
    """

    file: ProtocolNode
    cluster_size: int
    keep_cached: bool

    async def copy(self, parts: list[Part], source: SourcePlan) -> set[int]:
        """Copy the source into the parts.

        Clusters that are all zeroes are not written, unless they are cloned; returns their guest offsets.
        What the source lacks at the end of the last cluster is zeroes.

        Cancel:   takes effect when nothing is written any more.
        """
        zero_clusters: set[int] = set()
        left: list[PartCopy] = []
        for part in parts:
            own_source = source.gathered(part.ranges)
            found = await self._copy_apart(part, own_source.segments)
            if found is None:
                left.append(PartCopy(part, own_source, await source_reader(own_source)))
            else:
                zero_clusters.update(part.guest_offsets(found))
        if left:
            zero_clusters |= await in_thread(self._copy_parts_blocking, left)
        return zero_clusters

    async def _copy_apart(self, part: Part, source: list[Segment]) -> list[int] | None:
        """Let the file copy a part apart from this process; None: it does not.

        Tells the positions of clusters that are all zeroes.
        """
        if part.host_offset is None or self.keep_cached or not self.file.copies_apart:
            return None
        await asyncio.sleep(0)  # guests have their turn: getting here took as long as one of their requests
        return await self.file.copy_apart(source, part.host_offset, part.length, self.cluster_size)

    def split(self, start: int, end: int, source: SourcePlan) -> Iterator[tuple[int, int, Segment | None]]:
        """Split a range of clusters by whether they can be cloned, from the segment that is told."""
        rest = position = start
        for segment in source.part(start, end):
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

    def _copy_parts_blocking(self, copies: list[PartCopy]) -> set[int]:
        zero_clusters: set[int] = set()
        for copy in copies:
            for start, end, segment in self.split(0, copy.part.length, copy.source):
                if segment is not None:
                    self._clone_blocking(copy, start, segment)
                else:
                    zero_clusters.update(copy.part.guest_offsets(self._copy_blocking(copy, start, end)))
        return zero_clusters

    def _copy_blocking(self, copy: PartCopy, start: int, end: int) -> Iterator[int]:
        """Copy a stretch of clusters of a part; yields the positions of those that are all zeroes."""
        piece_length = max(LENGTH, self.cluster_size)
        for piece in range(start, end, piece_length):
            length = min(piece_length, end - piece)
            with copy_memory.lent(length) as buffer:
                copy.read(piece, buffer)
                for position, data in self._data(buffer):
                    if data:
                        self.write_part_blocking(copy.part, piece + position, data)
                    else:
                        yield piece + position

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

    def _clone_blocking(self, copy: PartCopy, position: int, segment: Segment) -> None:
        """Clone a stretch of clusters of a part; copy what cannot be cloned after all."""
        end = position + segment.length
        while position < end:
            host_offset, length = copy.part.place(position, end - position)
            [first] = clipped([segment], segment.length - (end - position), length)
            if not self.clone_blocking(first, host_offset):
                with copy_memory.lent(length) as buffer:
                    copy.read(position, buffer)
                    self.write_blocking(host_offset, buffer)
            position += length


class CopyRun(NamedTuple):
    """Neighbouring clusters of a plan whose copies are alike: all data, all zeroes, or to be cloned."""

    start: int
    end: int
    is_zero: bool = False
    is_cloned: bool = False

    def is_alike(self, other: "CopyRun") -> bool:
        return (self.is_zero, self.is_cloned) == (other.is_zero, other.is_cloned)


def append_run(runs: list[CopyRun], run: CopyRun) -> None:
    """Add what follows, to the last run where it can be."""
    if runs and runs[-1].end == run.start and runs[-1].is_alike(run):
        runs[-1] = runs[-1]._replace(end=run.end)
    else:
        runs.append(run)


class Copy(NamedTuple):
    """One copy on its way: `memory` is for what the plan has from `offset` on."""

    target: Target
    memory: memoryview
    offset: int
    source: SourcePlan
    read: Read

    @classmethod
    def read_whole_blocking(
        cls, target: Target, held: contextlib.ExitStack, source: SourcePlan, read: Read, length: int
    ) -> tuple["Copy", list[CopyRun]]:
        """Read so much of a plan that counts from 0 on, into memory that `held` gives back."""
        copy = cls(target, held.enter_context(copy_memory.lent(length)), 0, source, read)
        return copy, copy.read_blocking([CopyRun(0, length)])

    def read_blocking(self, planned: list[CopyRun]) -> list[CopyRun]:
        """Read the source where it cannot be cloned, and tell where it is zero."""
        runs: list[CopyRun] = []
        for run in planned:
            if run.is_zero:
                append_run(runs, run)
                continue
            for start, end, segment in self.target.split(run.start, run.end, self.source):
                if segment is not None:
                    append_run(runs, CopyRun(start, end, is_cloned=True))
                else:
                    self._read_run(start, end, runs)
        return runs

    def _read_run(self, start: int, end: int, runs: list[CopyRun]) -> None:
        size = self.target.cluster_size
        data = self._memory(start, end)
        self.read(start, data)
        position = start
        for zeroes in (start + zeroes for zeroes in zero_clusters(data, size)):
            if position < zeroes:
                append_run(runs, CopyRun(position, zeroes))
            position = min(zeroes + size, end)
            append_run(runs, CopyRun(zeroes, position, is_zero=True))
        if position < end:
            append_run(runs, CopyRun(position, end))

    def store_blocking(self, run: CopyRun, host_offset: int) -> None:
        """Write or clone a run; what cannot be cloned after all is read only now."""
        if not run.is_cloned:
            self.target.write_blocking(host_offset, self._memory(run.start, run.end))
            return
        start = run.start
        for segment in self.source.part(run.start, run.end):
            place = host_offset + start - run.start
            if not self.target.clone_blocking(segment, place):
                data = self._memory(start, start + segment.length)
                self.read(start, data)
                self.target.write_blocking(place, data)
            start += segment.length

    def _memory(self, start: int, end: int) -> memoryview:
        return self.memory[start - self.offset : end - self.offset]
