"""Guest writes to an image with extended L2 entries: what is allocated is a subcluster.

The first write into a cluster allocates the cluster, in the file, and marks those of its subclusters that
were written. Later ones go to the same place; a subcluster that is marked is written in place, any
other is filled up with the old content around what the guest wrote, and marked then. Nobody reads its
place before.

A cluster that is compressed, or that a snapshot shares, has no parts that could be written. It is copied
whole to a place of its own first.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockd.block.node import Buffer
from blockd.formats.qcow2.header import SUBCLUSTER_COUNT
from blockd.formats.qcow2.mapping import COMPRESSED, COPIED, OFFSET_MASK
from blockd.formats.qcow2.metadata import Metadata
from blockd.formats.qcow2.runs import Run
from blockd.formats.qcow2.subcluster_lookup import (
    ALL_SUBCLUSTERS,
    Subclusters,
    contradiction,
    is_sound,
)
from blockd.formats.qcow2.writes import ALLOCATING_WRITE_LENGTH_MAX, GuestWrites
from blockd.units import align_down, align_up

if TYPE_CHECKING:
    from blockd.formats.qcow2.image import Qcow2Image

# The entry of a cluster and the bitmap of its subclusters.
Pair = tuple[int, int]
NOTHING: Pair = (0, 0)
ALL_ZEROES = ALL_SUBCLUSTERS << SUBCLUSTER_COUNT


def is_own(entry: int) -> bool:
    """Whether a cluster has a place in the file that nobody else uses."""
    return bool(entry & OFFSET_MASK and entry & (COPIED | COMPRESSED) == COPIED)


def has_no_place(entry: int) -> bool:
    """Whether a cluster takes no space in the file."""
    return not entry & (OFFSET_MASK | COMPRESSED)


def with_content(pair: Pair, host_offset: int, bits: int) -> Pair:
    """A cluster at `host_offset` some more of whose subclusters are there."""
    return host_offset | COPIED, (pair[1] | bits) & ~(bits << SUBCLUSTER_COUNT)


def with_zeroes(pair: Pair, bits: int, *, keeps_place: bool) -> Pair:
    """A cluster some of whose subclusters are zeroes now; its place goes with the last of its content."""
    entry, bitmap = pair
    bitmap = bitmap & ~bits | bits << SUBCLUSTER_COUNT
    is_needed = bitmap & ALL_SUBCLUSTERS or (keeps_place and is_own(entry))
    return entry if is_needed else 0, bitmap


class SubclusterWrites(GuestWrites):
    """The write side of an image with extended L2 entries.

    Locks:    `ranges` is held for whole clusters.
    """

    def __init__(self, image: "Qcow2Image", metadata: Metadata) -> None:
        super().__init__(image, metadata)
        self.image = image
        self.subclusters = Subclusters(self.whole_size)

    def pairs(self, start: int, cluster_count: int) -> list[Pair]:
        """Entries and bitmaps of neighbouring clusters, as they are in memory.

        Needs:    their table was looked up without waiting for anything since, or there is none.
        Raises:   Corruption: such entries cannot be.
        """
        table = self._mapping.tables.get(start >> self._mapping.table_bits)
        if table is None:
            return [NOTHING] * cluster_count
        index = self._index(start)
        flat = table.entries[index : index + 2 * cluster_count].tolist()
        found = list(zip(flat[::2], flat[1::2], strict=True))
        for number, pair in enumerate(found):
            if not is_sound(*pair, self.whole_size):
                raise contradiction(self._image.file, start + number * self.whole_size, *pair)
        return found

    def publish(self, start: int, pairs: Sequence[Pair]) -> None:
        """Put new entries and bitmaps in place and free what the old ones named.

        Needs:    the range is held, inside one table, and that table is in memory.
        Raises:   Corruption: they named metadata; nothing is changed.
        """
        l1_index = start >> self._mapping.table_bits
        old_entries = [entry for entry, _ in self.pairs(start, len(pairs))]
        self._let_go(start, old_entries, [entry for entry, _ in pairs])
        flat = [item for pair in pairs for item in pair]
        self._mapping.set_entries(l1_index, self._mapping.tables[l1_index], self._index(start), flat)

    def _index(self, offset: int) -> int:
        return 2 * (offset >> self._mapping.cluster_bits & self._mapping.index_mask)

    def own_place(self, offset: int, entry: int) -> int:
        """Where a cluster is that has a place of its own."""
        host_offset = entry & OFFSET_MASK
        if self._metadata.is_misplaced(host_offset):
            raise self._image.misplaced(offset, host_offset)
        return host_offset

    # -- data ---------------------------------------------------------------------------------

    def write_new_nowait(self, offset: int, data: Buffer) -> bool:
        return False

    async def _write_allocating(self, offset: int, data: memoryview) -> int:
        await self._metadata.relieve()
        start = align_down(offset, self.whole_size)
        data = data[: start + ALLOCATING_WRITE_LENGTH_MAX - offset]
        async with self.ranges.held(start, align_up(offset + len(data), self.whole_size)):
            await self._mapping.table(start >> self._mapping.table_bits)
            if await self.rewritten(start):
                return 0
            data = data[: self._missing_length(offset, len(data))]
            if data:
                return await self._write_to_place(start, offset, data)
        return 0

    def _missing_length(self, offset: int, length: int) -> int:
        """How much from `offset` on can be written at once to subclusters without content.

        They are in one cluster that has a place of its own, or in several without one; 0: the map changed.
        """
        start = align_down(offset, self.whole_size)
        count = (align_up(offset + length, self.whole_size) - start) // self.whole_size
        pairs = self.pairs(start, count)
        if is_own(pairs[0][0]):
            count = 1
        else:
            count = next((n for n, (entry, _) in enumerate(pairs) if not has_no_place(entry)), count)
        end = min(offset + length, start + count * self.whole_size)
        position = align_down(offset, self.subclusters.size)
        while position < end and self._image.own_host_offset(position, 1) is None:
            position += self.subclusters.size
        return max(0, min(position, end) - offset)

    async def _write_to_place(self, start: int, offset: int, data: memoryview) -> int:
        """Write to subclusters without content: `start` is that of their first cluster."""
        count = (align_up(offset + len(data), self.whole_size) - start) // self.whole_size
        entry, _ = self.pairs(start, 1)[0]
        run = Run(self.own_place(start, entry), 1) if is_own(entry) else await self._metadata.allocate(count)
        data = data[: start + run.cluster_count * self.whole_size - offset]
        first = align_down(offset, self.subclusters.size)
        try:
            content = await self._with_edges(offset, data)
            await self._write_in_place(run.host_offset + first - start, content)
            await self._metadata.writable_table(start >> self._mapping.table_bits)
        except BaseException:
            if not is_own(entry):
                self._allocator.give_back(run)
            raise
        self._publish_content(start, run, first, offset + len(data))
        return len(data)

    def _publish_content(self, start: int, run: Run, first: int, end: int) -> None:
        """Mark the subclusters from `first` to `end`, whose clusters are in `run` from `start` on."""
        pairs = []
        for number, pair in enumerate(self.pairs(start, run.cluster_count)):
            low = start + number * self.whole_size
            bits = self.subclusters.bits(max(first, low), min(end, low + self.whole_size))
            pairs.append(with_content(pair, run.host_offset + number * self.whole_size, bits))
        self.publish(start, pairs)

    async def rewritten(self, start: int) -> bool:
        """Copy a cluster that is compressed or shared to a place of its own; False: it is neither.

        Needs:    its range is held, its table was looked up without waiting for anything since.
        """
        entry, _ = self.pairs(start, 1)[0]
        if has_no_place(entry) or is_own(entry):
            return False
        run = await self._metadata.allocate(1)
        try:
            content = await self._old_content(start, start + self.whole_size)
            await self._write_in_place(run.host_offset, memoryview(content))
            await self._metadata.writable_table(start >> self._mapping.table_bits)
        except BaseException:
            self._allocator.give_back(run)
            raise
        self.publish(start, [(run.host_offset | COPIED, ALL_SUBCLUSTERS)])
        return True

    # -- zeroes and discard -------------------------------------------------------------------

    def discard_nowait(self, offset: int, length: int) -> bool:
        return False

    def write_zeroes_nowait(self, offset: int, length: int) -> bool:
        return False

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Turn whole subclusters into zeroes, and write zeroes to the parts at both ends."""
        for cluster in {align_down(end, self.whole_size) for end in (offset, offset + length - 1)}:
            if not self._is_covered(cluster, offset, offset + length):
                await self._uncompress(cluster)
        await super().write_zeroes(offset, length, unmap=unmap)

    def _is_covered(self, cluster: int, start: int, end: int) -> bool:
        return start <= cluster and end >= min(cluster + self.whole_size, self._image.size)

    async def _uncompress(self, cluster: int) -> None:
        """A part of a compressed cluster cannot be zeroes."""
        await self._metadata.relieve()
        async with self.ranges.held(cluster, cluster + self.whole_size):
            await self._mapping.table(cluster >> self._mapping.table_bits)
            if self.pairs(cluster, 1)[0][0] & COMPRESSED:
                await self.rewritten(cluster)

    async def _zero_locked(self, start: int, end: int, *, unmap: bool) -> None:
        await self._metadata.writable_table(start >> self._mapping.table_bits)
        low = align_down(start, self.whole_size)
        self.publish(low, self._zeroed(start, end, keeps_place=not unmap))

    def _forget_locked(self, start: int, cluster_count: int) -> None:
        self.publish(start, [(0, 0)] * cluster_count)

    def _zeroed(self, start: int, end: int, *, keeps_place: bool) -> list[Pair]:
        """The clusters of a range, with zeroes in the range."""
        low, changed = align_down(start, self.whole_size), []
        for pair in self.pairs(low, (align_up(end, self.whole_size) - low) // self.whole_size):
            bits = self.subclusters.bits(max(start, low), min(end, low + self.whole_size))
            if pair[0] & COMPRESSED:
                # A part of it is only discarded, which may be left undone.
                changed.append((0, ALL_ZEROES) if self._is_covered(low, start, end) else pair)
            else:
                if not self._image.is_backed:
                    bits &= pair[1] | pair[1] >> SUBCLUSTER_COUNT  # what is nothing reads as zeroes already
                changed.append(with_zeroes(pair, bits, keeps_place=keeps_place))
            low += self.whole_size
        return changed
