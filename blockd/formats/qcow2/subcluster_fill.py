"""Filling an image with extended L2 entries: copies go to subclusters that hold nothing yet.

Other subclusters of the same cluster may be in use, and a guest may write to the one that is being filled.
So the clusters of a fill are held until it is done, and a guest's write to them waits. (Where clusters
are allocated whole, nothing waits: fill.py.)
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from blockd.block.file_events import FileEvent
from blockd.block.node import FillCounts, IsWanted, Segment
from blockd.formats.copying import Part, Target, split_zeroes
from blockd.formats.qcow2.allocator import Run
from blockd.formats.qcow2.fill import empty_ranges
from blockd.formats.qcow2.header import SUBCLUSTER_COUNT
from blockd.formats.qcow2.mapping import COMPRESSED
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
    offset: int,
    length: int,
    source: list[Segment],
    is_wanted: IsWanted,
    *,
    keep_cached: bool,
) -> FillCounts:
    """Do what `OverlayNode.fill` promises."""
    image, size = writes.image, writes.whole_size
    await image.metadata.relieve()
    async with writes.ranges.held(align_down(offset, size), align_up(offset + length, size)):
        filling = _Filling(writes)
        try:
            for cluster in range(align_down(offset, size), offset + length, size):
                await filling.rewrite_shared(cluster)
            pieces = [
                Piece(*piece)
                for start, end in await empty_ranges(image, offset, length)
                for piece in split_zeroes(image, start, end, offset, source)
            ]
            await filling.find_places(pieces)
            image.file.announce(FileEvent.COR_WRITE)
            target = Target(image.file, image.cluster_size, keep_cached)
            zeroes = await target.copy(list(filling.parts(pieces)), offset, source)
            return await filling.publish(pieces, zeroes, is_wanted)
        finally:
            filling.give_back_unused()


class _Filling:
    """One fill: where the clusters are that get content, and what is marked in the end."""

    def __init__(self, writes: SubclusterWrites) -> None:
        self._writes = writes
        self._metadata = writes.image.metadata
        self._size = writes.whole_size
        # By guest offset of the cluster; the new ones are not in the map yet.
        self._places: dict[int, int] = {}
        self._new: set[int] = set()

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

    async def find_places(self, pieces: list[Piece]) -> None:
        """Find out where all pieces with content go, in as few runs as there are."""
        missing = []
        for cluster in self._clusters(piece for piece in pieces if not piece.is_zero):
            entry, _ = await self._pair(cluster)
            if is_own(entry):
                self._places[cluster] = self._writes.own_place(cluster, entry)
            else:
                missing.append(cluster)
        while missing:
            run = await self._metadata.allocate(len(missing))
            for cluster, host_offset in zip(
                missing, self._metadata.allocator.host_offsets(run), strict=False
            ):
                self._places[cluster] = host_offset
                self._new.add(cluster)
            missing = missing[run.cluster_count :]

    def _clusters(self, pieces: Iterable[Piece]) -> list[int]:
        found: dict[int, None] = {}
        for piece in pieces:
            found.update(dict.fromkeys(range(align_down(piece.offset, self._size), piece.end, self._size)))
        return list(found)

    def parts(self, pieces: list[Piece]) -> Iterator[Part]:
        """What is copied: of each piece the ranges that are neighbours in the file."""
        for piece in pieces:
            start = piece.offset
            while start < piece.end and not piece.is_zero:
                cluster = align_down(start, self._size)
                place, end = self._places[cluster], cluster + self._size
                while end < piece.end and self._places[end] == place + end - cluster:
                    end += self._size
                end = min(end, piece.end)
                yield Part.at(start, end - start, place + start - cluster)
                start = end

    # -- publishing ---------------------------------------------------------------------------

    async def publish(self, pieces: list[Piece], zeroes: set[int], is_wanted: IsWanted) -> FillCounts:
        """Mark what was copied and is still wanted, cluster by cluster."""
        copied = zeroed = dropped = 0
        for cluster in self._clusters(pieces):
            await self._metadata.writable_table(cluster >> self._metadata.mapping.table_bits)
            content = zero = 0
            for offset, is_zero in self._subclusters(cluster, pieces):
                bit = self._writes.subclusters.bits(offset, offset + 1)
                if not is_wanted(offset, offset + 1):
                    dropped += 1
                elif is_zero or offset in zeroes:
                    zero |= bit
                else:
                    content |= bit
            copied, zeroed = copied + content.bit_count(), zeroed + zero.bit_count()
            self._mark(cluster, content, zero)
        size = self._writes.subclusters.size
        return FillCounts(copied * size, zeroed * size, dropped * size)

    def _subclusters(self, cluster: int, pieces: list[Piece]) -> Iterator[tuple[int, bool]]:
        for piece in pieces:
            low, high = max(piece.offset, cluster), min(piece.end, cluster + self._size)
            for offset in range(low, high, self._writes.subclusters.size):
                yield offset, piece.is_zero

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
