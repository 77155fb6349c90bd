"""Filling an image with extended L2 entries: copies go to subclusters that hold nothing yet.

Other subclusters of the same cluster may be in use, and a guest may write to the one that is being filled.
So the clusters of a fill are held until it is done, and a guest's write to them waits. (Where clusters
are allocated whole, nothing waits: fill.py.)

A thread reads and finds zeroes; only clusters with something else get a place in the file.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from blockd.aio import in_thread
from blockd.block.copy_memory import LENGTH
from blockd.block.file_events import FileEvent
from blockd.block.node import FillCounts, IsWanted
from blockd.block.segments import SourcePlan
from blockd.extents import Range, RangeSet, total_length
from blockd.formats.copying import (
    Copy,
    CopyRun,
    Part,
    Target,
    empty_ranges,
    source_reader,
    split_zeroes,
)
from blockd.formats.qcow2.header import SUBCLUSTER_COUNT
from blockd.formats.qcow2.mapping import COMPRESSED
from blockd.formats.qcow2.runs import Run
from blockd.formats.qcow2.subcluster_lookup import ALL_SUBCLUSTERS
from blockd.formats.qcow2.subcluster_writes import Pair, SubclusterWrites, is_own, with_content
from blockd.units import align_down, align_up


class Piece(NamedTuple):
    """A range of empty subclusters of the guest, and whether it is known to be all zeroes."""

    offset: int
    end: int
    is_zero: bool


async def fill_subclusters(
    writes: SubclusterWrites,
    ranges: Sequence[Range],
    source: SourcePlan,
    is_wanted: IsWanted,
    *,
    keep_cached: bool,
) -> FillCounts:
    """Do what `OverlayNode.fill` promises."""
    image, size = writes.image, writes.whole_size
    await image.metadata.relieve()
    whole = [*RangeSet((align_down(start, size), align_up(end, size)) for start, end in ranges)]
    async with writes.ranges.held_together(whole):
        filling = _Filling(writes, source, keep_cached=keep_cached)
        try:
            for start, end in whole:
                for cluster in range(start, end, size):
                    await filling.rewrite_shared(cluster)
            empty = await empty_ranges(image, ranges)
            pieces = [Piece(*piece) for piece in split_zeroes(image, empty, source)]
            image.file.announce(FileEvent.COR_WRITE)
            await filling.copy([(piece.offset, piece.end) for piece in pieces if not piece.is_zero])
            return await filling.publish(pieces, is_wanted)
        finally:
            filling.give_back_unused()


class _Filling:
    """One fill: where the clusters are that get content, and what is marked in the end."""

    def __init__(self, writes: SubclusterWrites, source: SourcePlan, *, keep_cached: bool) -> None:
        self._writes = writes
        self._source = source
        self._metadata = writes.image.metadata
        self._target = Target(writes.image.file, writes.image.cluster_size, keep_cached)
        self._size = writes.whole_size
        self._records_zeroes = writes.image.records_zeroes
        # By guest offset of the cluster; the new ones are not in the map yet.
        self._places: dict[int, int] = {}
        self._new: set[int] = set()
        # Subclusters that turned out to be all zeroes.
        self._zeroes: set[int] = set()

    async def _pair(self, cluster: int) -> Pair:
        await self._metadata.mapping.table(cluster >> self._metadata.mapping.table_bits)
        return self._writes.pairs(cluster, 1)[0]

    async def rewrite_shared(self, cluster: int) -> None:
        """Give a cluster that a snapshot shares, and that is to be filled up, a place of its own."""
        entry, bitmap = await self._pair(cluster)
        is_full = (bitmap | bitmap >> SUBCLUSTER_COUNT) & ALL_SUBCLUSTERS == ALL_SUBCLUSTERS
        if not entry & COMPRESSED and not is_full:
            await self._writes.rewritten(cluster)

    # -- copying ------------------------------------------------------------------------------

    async def copy(self, ranges: list[Range]) -> None:
        """Copy ranges of subclusters, but for those that are all zeroes."""
        whole, length = Part.at(ranges, 0), total_length(ranges)
        for start in range(0, length, LENGTH):
            await self._copy_part(Part.at(list(whole.guest_ranges(start, min(LENGTH, length - start))), 0))

    async def _copy_part(self, part: Part) -> None:
        source = self._source.gathered(part.ranges)
        read = await source_reader(source)
        with contextlib.ExitStack() as held:
            copy, runs = await in_thread(
                Copy.read_whole_blocking, self._target, held, source, read, part.length
            )
            cut = [found for run in runs for found in self._cut(part, run)]
            self._zeroes.update(
                subcluster
                for run, offset in cut
                if run.is_zero
                for subcluster in range(offset, offset + run.end - run.start, self._target.cluster_size)
            )
            stored = [(run, offset) for run, offset in cut if not run.is_zero]
            await self._find_places({align_down(offset, self._size): None for _, offset in stored})
            if stored:
                await in_thread(self._write_blocking, copy, self._placed(stored))

    def _cut(self, part: Part, run: CopyRun) -> Iterator[tuple[CopyRun, int]]:
        """A run of copies cut at clusters, each with its guest offset."""
        position = run.start
        for range_start, end in part.guest_ranges(run.start, run.end - run.start):
            start = range_start
            while start < end:
                length = min(end, align_down(start, self._size) + self._size) - start
                yield run._replace(start=position, end=position + length), start
                start, position = start + length, position + length

    async def _find_places(self, clusters: Iterable[int]) -> None:
        """Find out where clusters are, or are going to be, in as few runs as there are."""
        missing = []
        for cluster in clusters:
            entry, _ = await self._pair(cluster)
            if is_own(entry):
                self._places[cluster] = self._writes.own_place(cluster, entry)
            elif cluster not in self._places:
                missing.append(cluster)
        while missing:
            run = await self._metadata.allocate(len(missing))
            for cluster, host_offset in zip(
                missing, self._metadata.allocator.host_offsets(run), strict=False
            ):
                self._places[cluster] = host_offset
                self._new.add(cluster)
            missing = missing[run.cluster_count :]

    def _placed(self, stored: list[tuple[CopyRun, int]]) -> list[tuple[CopyRun, int]]:
        """Where in the file copies go, those that are neighbours there as one."""
        placed: list[tuple[CopyRun, int]] = []
        for run, offset in stored:
            cluster = align_down(offset, self._size)
            host_offset = self._places[cluster] + offset - cluster
            last, last_offset = placed[-1] if placed else (CopyRun(0, 0), -1)
            is_next = last.end == run.start and last_offset + last.end - last.start == host_offset
            if is_next and last.is_alike(run):
                placed[-1] = last._replace(end=run.end), last_offset
            else:
                placed.append((run, host_offset))
        return placed

    def _write_blocking(self, copy: Copy, placed: list[tuple[CopyRun, int]]) -> None:
        for run, host_offset in placed:
            copy.store_blocking(run, host_offset)

    # -- publishing ---------------------------------------------------------------------------

    async def publish(self, pieces: list[Piece], is_wanted: IsWanted) -> FillCounts:
        """Mark what was copied and is still wanted, cluster by cluster."""
        copied = zeroed = dropped = 0
        for cluster, parts in groupby(self._in_clusters(pieces), itemgetter(0)):
            if not self._records_zeroes and cluster not in self._places:
                zeroed += sum(
                    self._writes.subclusters.bits(start, end).bit_count() for _, start, end, _ in parts
                )
                continue
            await self._metadata.writable_table(cluster >> self._metadata.mapping.table_bits)
            content = zero = 0
            for _, start, end, is_zero in parts:
                bits = self._writes.subclusters.bits(start, end)
                wanted = bits if is_wanted(start, end) else self._wanted(start, end, is_wanted)
                zero_bits = bits if is_zero else self._zero(start, end)
                zero |= wanted & zero_bits
                content |= wanted & ~zero_bits
                dropped += (bits & ~wanted).bit_count()
            copied, zeroed = copied + content.bit_count(), zeroed + zero.bit_count()
            self._mark(cluster, content, zero if self._records_zeroes else 0)
        size = self._writes.subclusters.size
        return FillCounts(copied * size, zeroed * size, dropped * size)

    def _in_clusters(self, pieces: list[Piece]) -> Iterator[tuple[int, int, int, bool]]:
        """The pieces cut at clusters: the cluster, start and end, whether it is known to be zeroes."""
        for piece in pieces:
            start = piece.offset
            while start < piece.end:
                cluster = align_down(start, self._size)
                end = min(cluster + self._size, piece.end)
                yield cluster, start, end, piece.is_zero
                start = end

    def _wanted(self, start: int, end: int, is_wanted: IsWanted) -> int:
        """The bits of those subclusters in a part of a cluster that are wanted still."""
        subclusters = self._writes.subclusters
        offsets = range(start, end, subclusters.size)
        return sum(
            subclusters.bits(offset, offset + 1) for offset in offsets if is_wanted(offset, offset + 1)
        )

    def _zero(self, start: int, end: int) -> int:
        """The bits of those that were found to be zeroes."""
        if not self._zeroes:
            return 0
        subclusters = self._writes.subclusters
        offsets = range(start, end, subclusters.size)
        return sum(subclusters.bits(offset, offset + 1) for offset in offsets if offset in self._zeroes)

    def _mark(self, cluster: int, content: int, zero: int) -> None:
        pair = self._writes.pairs(cluster, 1)[0]
        if content:
            pair = with_content(pair, self._places[cluster], content)
            self._new.discard(cluster)
        self._writes.publish(cluster, [(pair[0], pair[1] | zero << SUBCLUSTER_COUNT)])

    def give_back_unused(self) -> None:
        """Let go of new clusters that nothing was put into after all."""
        for cluster in self._new:
            self._metadata.allocator.give_back(Run(self._places[cluster], 1))
