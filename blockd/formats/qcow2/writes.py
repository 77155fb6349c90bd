"""Guest writes that may change the map: allocation with copy-on-write, zeroes, discard.

A write to clusters that are the image's own goes in place. For all others new clusters are
allocated, the parts of them that the guest did not write are filled up with the old content, and
when all is written the new map entries are published at once. The old clusters are freed; those that a
snapshot shares live on. A zero cluster that has a place of its own in the file is written there.

Version 2 has no zero clusters: there zeroes over a backing are data.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockd.aio import Turns
from blockd.block.chain import chain_map
from blockd.block.file_events import FileEvent
from blockd.block.node import Buffer
from blockd.block.segments import zeroes
from blockd.extents import Kind
from blockd.formats.qcow2.allocator import FREED_AT_ONCE_MAX
from blockd.formats.qcow2.mapping import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    STATE_MASK,
    ZERO,
    compressed_extent,
)
from blockd.formats.qcow2.metadata import Metadata
from blockd.formats.qcow2.runs import Run
from blockd.range_lock import RangeLock
from blockd.units import MIB, align_down, align_up

if TYPE_CHECKING:
    from blockd.formats.qcow2.image import Qcow2Image

# One allocating write at most, so that the copy of its edges and the wait behind it stay short.
ALLOCATING_WRITE_LENGTH_MAX = 2 * MIB
# How many clusters become zeroes without a task: this takes as long as a large write.
ZEROED_AT_ONCE_MAX = 64


class GuestWrites:
    """The write side of one image.

    Locks:    `ranges` is held, cluster aligned, while the map of a range is being changed; it comes
              before the metadata lock.
    """

    def __init__(self, image: "Qcow2Image", metadata: Metadata) -> None:
        self._image = image
        self._metadata = metadata
        self._mapping = metadata.mapping
        self._allocator = metadata.allocator
        # What is allocated at a time, and the clusters that range locks and map entries are for.
        self._cluster_size = image.cluster_size
        self.whole_size = metadata.header.cluster_size
        self._knows_zero = metadata.knows_zero
        self.ranges = RangeLock()

    def is_in_flight(self, offset: int, length: int) -> bool:
        """Whether the map of any part of the range is being changed."""
        return bool(self.ranges) and self.ranges.overlaps(offset, offset + length)

    # -- data ---------------------------------------------------------------------------------

    def write_new_nowait(self, offset: int, data: Buffer) -> bool:
        """Write to a cluster that is unallocated so far, if all that this takes is in memory.

        Locks:    none: from looking the cluster up to publishing it nothing is waited for.
        """
        mapping, cluster_size = self._mapping, self._cluster_size
        l1_index = offset >> mapping.table_bits
        table = mapping.tables.get(l1_index)
        if table is None or not mapping.l1[l1_index] & COPIED:
            return False
        index = (offset >> mapping.cluster_bits) & mapping.index_mask
        start = offset & -cluster_size
        is_new = not table.entries[index] and offset + len(data) <= start + cluster_size
        if not is_new or self._metadata.needs_relief:
            return False
        content = data if len(data) == cluster_size else self._merged_nowait(start, offset, data)
        run = self._allocator.allocate_nowait(1) if content is not None else None
        if content is None or run is None:
            return False
        if not self._image.file.write_nowait(run.host_offset, content):
            self._allocator.give_back(run)
            return False
        mapping.set_entry(l1_index, table, index, run.host_offset | COPIED)
        return True

    def _merged_nowait(self, start: int, offset: int, data: Buffer) -> Buffer | None:
        """The content of a whole cluster that is unallocated, with `data` in it, if that needs no waiting."""
        end, backing = start + self._cluster_size, self._image.backing
        if backing is None or start >= backing.size:
            content = bytearray(self._cluster_size)
        elif end <= backing.size and end <= self._image.size:
            old = backing.read_nowait(start, self._cluster_size)
            if old is None:
                return None
            content = old if isinstance(old, bytearray) else bytearray(old)
        else:
            return None  # where a disk ends
        content[offset - start : offset - start + len(data)] = data
        return content

    async def write(self, offset: int, data: memoryview) -> None:
        """Write, in place or to new clusters, piece by piece."""
        while data:
            table_end = ((offset >> self._mapping.table_bits) + 1) << self._mapping.table_bits
            piece = data[: table_end - offset]
            await self._mapping.table(offset >> self._mapping.table_bits)
            await self.ranges.wait(offset, offset + len(piece))
            host_offset, count = self._own_prefix(offset, len(piece))
            if count:
                await self._write_in_place(host_offset, piece[:count])
            else:
                count = await self._write_allocating(offset, piece)
            offset += count
            data = data[count:]

    def _own_prefix(self, offset: int, length: int) -> tuple[int, int]:
        """Host offset and length of the first part of a range that may be written in place."""
        first = self._image.own_host_offset(offset, 1)
        if first is None:
            return 0, 0
        count = align_up(offset + 1, self._cluster_size) - offset
        while count < length and self._image.own_host_offset(offset + count, 1) == first + count:
            count += self._cluster_size
        return first, min(count, length)

    async def _write_in_place(self, host_offset: int, data: memoryview) -> None:
        file = self._image.file
        with self._allocator.plan():
            if not file.write_nowait(host_offset, data):
                file.announce(FileEvent.WRITE_AIO)
                await file.write(host_offset, data)

    async def _write_allocating(self, offset: int, data: memoryview) -> int:
        """Write the first part of `data` to new clusters; 0 means the map changed meanwhile."""
        await self._metadata.relieve()
        data = data[: align_down(offset, self._cluster_size) + ALLOCATING_WRITE_LENGTH_MAX - offset]
        start, end = align_down(offset, self._cluster_size), align_up(offset + len(data), self._cluster_size)
        async with self.ranges.held(start, end):
            # In memory, or all clusters would be taken for foreign: those of others' writes in place, too.
            await self._mapping.table(start >> self._mapping.table_bits)
            cluster_count = self._foreign_count(start, end)
            if not cluster_count:
                return 0
            reserve = self._zero_run(start, cluster_count)
            run = reserve or await self._metadata.allocate(cluster_count)
            data = data[: start + run.cluster_count * self._cluster_size - offset]
            try:
                content = await self._with_edges(offset, data)
                await self._write_in_place(run.host_offset, content)
                await self._metadata.writable_table(start >> self._mapping.table_bits)
            except BaseException:
                if reserve is None:
                    self._allocator.give_back(run)
                raise
            first = run.host_offset | COPIED
            self._publish(start, [first + number * self._cluster_size for number in range(run.cluster_count)])
        return len(data)

    def _foreign_count(self, start: int, end: int) -> int:
        """How many clusters from `start` on must not be written in place."""
        for cluster_offset in range(start, end, self._cluster_size):
            if self._image.own_host_offset(cluster_offset, 1) is not None:
                return (cluster_offset - start) // self._cluster_size
        return (end - start) // self._cluster_size

    def _zero_run(self, start: int, cluster_count: int) -> Run | None:
        """The place of the zero clusters that begin at `start`, if they have one of their own."""
        first = count = 0
        for number in range(cluster_count):
            offset = start + number * self._cluster_size
            entry = self._image.entry_nowait(offset, 1, STATE_MASK | COPIED)
            host_offset = entry & OFFSET_MASK
            is_own = entry > 0 and entry & (COPIED | COMPRESSED | ZERO) == COPIED | ZERO and host_offset
            if not is_own or (count and host_offset != first + number * self._cluster_size):
                break
            if self._metadata.is_misplaced(host_offset):
                raise self._image.misplaced(offset, host_offset)
            first, count = first or host_offset, count + 1
        return Run(first, count) if count else None

    async def _with_edges(self, offset: int, data: memoryview) -> memoryview:
        """Fill `data` up to whole clusters with what the disk holds around it."""
        end = offset + len(data)
        head = await self._old_content(align_down(offset, self._cluster_size), offset)
        tail = await self._old_content(end, align_up(end, self._cluster_size))
        return memoryview(b"".join((head, data, tail))) if head or tail else data

    async def _old_content(self, start: int, end: int) -> Buffer:
        """What the disk holds; zeroes past its end."""
        stored = min(end, self._image.size) - start
        if stored <= 0:
            return bytes(end - start)
        self._image.file.announce(FileEvent.COW_READ)
        content = self._image.read_nowait(start, stored)
        if content is None:
            content = await self._image.read(start, stored)
        return content if stored == end - start else bytes(content).ljust(end - start, b"\0")

    def _publish(self, offset: int, entries: list[int]) -> None:
        """Put new map entries in place and free what the old ones named.

        Needs:    the range is held, inside one table, and that table is in memory.
        Raises:   Corruption: they named metadata; nothing is changed.
        """
        l1_index = offset >> self._mapping.table_bits
        table = self._mapping.tables[l1_index]
        index = (offset >> self._mapping.cluster_bits) & self._mapping.index_mask
        self._let_go(offset, table.entries[index : index + len(entries)], entries)
        self._mapping.set_entries(l1_index, table, index, entries)

    def _let_go(self, offset: int, old_entries: Sequence[int], new_entries: Sequence[int]) -> None:
        """Free what the entries of some clusters named, unless those that replace them still do."""
        freed: list[Run] = []
        first = end = 0  # neighbours that are freed together, which is much cheaper
        step = 1 << self._mapping.cluster_bits
        for old, new in zip(old_entries, new_entries, strict=True):
            if not old & OFFSET_MASK or not (old ^ new) & OFFSET_MASK:
                continue
            if old & COMPRESSED:
                freed.append(stored_run(old, self._mapping.cluster_bits))
            elif old & OFFSET_MASK == end:
                end += step
            else:
                self._add_run(freed, first, end)
                first = old & OFFSET_MASK
                end = first + step
        self._add_run(freed, first, end)
        for run in freed:
            if not self._metadata.reserved.isdisjoint(self._allocator.host_offsets(run)):
                raise self._image.misplaced(offset, run.host_offset)
        for run in freed:
            self._allocator.free(run)

    def _add_run(self, runs: list[Run], first: int, end: int) -> None:
        if first < end:
            runs.append(Run(first, (end - first) >> self._mapping.cluster_bits))

    # -- zeroes and discard -------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Turn whole clusters into zero clusters, and make the parts at both ends zeroes."""
        end = offset + length
        if not self._knows_zero and self._image.is_backed:
            await self._write_zero_data(offset, end)
            return
        first = min(align_up(offset, self._cluster_size), end)
        last = max(self._cluster_end(end), first)
        await self._zero_part(offset, first, unmap=unmap)
        await self._zero_clusters(first, last, unmap=unmap)
        await self._zero_part(last, end, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        """Give back the whole clusters of the range; not where the backing would come to light."""
        if not self._knows_zero and self._image.is_backed:
            return
        first = align_up(offset, self._cluster_size)
        await self._zero_clusters(first, self._cluster_end(offset + length), unmap=True)

    def discard_nowait(self, offset: int, length: int) -> bool:
        """Do what `discard` does if it needs no waiting, else nothing; whether it is done."""
        return self._zero_nowait(align_up(offset, self._cluster_size), self._cluster_end(offset + length))

    def write_zeroes_nowait(self, offset: int, length: int) -> bool:
        """Do what `write_zeroes` does if these are whole clusters and it needs no waiting, else nothing."""
        end = offset + length
        is_whole = not offset % self._cluster_size and self._cluster_end(end) == end
        return is_whole and self._zero_nowait(offset, end)

    def _zero_nowait(self, start: int, end: int) -> bool:
        """Turn a few whole clusters into zero clusters.

        Locks:    none: from looking them up to publishing them nothing is waited for.
        """
        mapping = self._mapping
        if not self._knows_zero and self._image.is_backed:
            return False
        if start >= end:
            return True
        l1_index = start >> mapping.table_bits
        count = ((end - 1) >> mapping.cluster_bits) - (start >> mapping.cluster_bits) + 1
        is_in_table = (end - 1) >> mapping.table_bits == l1_index and mapping.l1[l1_index] & COPIED
        table = mapping.tables.get(l1_index) if is_in_table and count <= ZEROED_AT_ONCE_MAX else None
        if table is None or self._metadata.needs_relief:
            return False
        index = (start >> mapping.cluster_bits) & mapping.index_mask
        old = table.entries[index : index + count].tolist()
        if (new := list(map(self._unmapped_zero, old))) != old:
            self._publish(start, new)
        return True

    def _cluster_end(self, end: int) -> int:
        """The end of the last whole cluster; the disk's end completes its cluster."""
        return end if end == self._image.size else align_down(end, self._cluster_size)

    async def _zero_part(self, start: int, end: int, *, unmap: bool) -> None:
        """Make a part of a cluster zeroes: the whole of it if the rest reads as zeroes and is not stored."""
        if start == end:
            return
        await self._mapping.table(start >> self._mapping.table_bits)
        if self._reads_as_zero(self._image.entry_nowait(start, end - start)):
            return
        if not await self._zero_around(start, end, unmap=unmap):
            await self.write(start, memoryview(zeroes(end - start)))

    async def _zero_around(self, start: int, end: int, *, unmap: bool) -> bool:
        """Turn a cluster into zeroes of which the rest reads as zeroes; False: it cannot be."""
        low = align_down(start, self._cluster_size)
        # A disk that is being made larger has its old size still.
        high = min(low + self._cluster_size, max(self._image.size, end))
        await self._metadata.relieve()
        async with self.ranges.held(*self._locked_range(low, high)):
            await self._mapping.table(low >> self._mapping.table_bits)
            if self._image.entry_nowait(low, 1):
                return False
            if not (await self._is_zero_below(low, start) and await self._is_zero_below(end, high)):
                return False
            await self._zero_locked(low, high, unmap=unmap)
        return True

    async def _is_zero_below(self, start: int, end: int) -> bool:
        """Whether the backing is known to read as zeroes in a range; nothing is read for it."""
        backing = self._image.backing
        end = end if backing is None else min(end, backing.size)
        while start < end:
            if backing is None:
                return False  # it is detached for the moment
            for extent in await chain_map(backing, start, end - start):
                if extent.kind is Kind.DATA:
                    return False
                start = extent.end
        return True

    async def _write_zero_data(self, start: int, end: int) -> None:
        while start < end:
            count = min(end - start, ALLOCATING_WRITE_LENGTH_MAX)
            await self.write(start, memoryview(zeroes(count)))
            start += count

    def _reads_as_zero(self, entry: int) -> bool:
        if entry == 0:
            return not self._image.is_backed
        return entry > 0 and not entry & COMPRESSED and bool(entry & ZERO)

    def _unmapped_zero(self, entry: int) -> int:
        return ZERO if self._knows_zero and (entry or self._image.is_backed) else 0

    def _kept_zero(self, entry: int) -> int:
        is_own = self._knows_zero and entry & (COPIED | COMPRESSED) == COPIED
        return entry | ZERO if is_own else self._unmapped_zero(entry)

    def _piece_end(self, start: int, end: int) -> int:
        """Up to where a range that begins at `start` is changed in one go: inside one table."""
        piece = FREED_AT_ONCE_MAX * self._cluster_size
        table_end = ((start >> self._mapping.table_bits) + 1) << self._mapping.table_bits
        return min(end, align_down(start, piece) + piece, table_end)

    async def _zero_clusters(self, start: int, end: int, *, unmap: bool) -> None:
        """Turn whole clusters into zero clusters, a part of a table at a time, with others' turns between."""
        while start < end:
            piece_end = self._piece_end(start, end)
            if self._mapping.l1[start >> self._mapping.table_bits] or self._unmapped_zero(0):
                await asyncio.sleep(0)
                await self._metadata.relieve()
                async with self.ranges.held(*self._locked_range(start, piece_end)):
                    await self._zero_locked(start, piece_end, unmap=unmap)
            start = piece_end

    async def forget(self, start: int, end: int) -> None:
        """Let the map name nothing in the whole clusters of a range behind the disk's end."""
        start, end = align_up(start, self.whole_size), align_up(end, self.whole_size)
        turns = Turns()
        while start < end:
            await turns.pass_on()
            l1_index = start >> self._mapping.table_bits
            if not self._mapping.l1[l1_index]:
                start = (l1_index + 1) << self._mapping.table_bits
                continue
            piece_end = self._piece_end(start, end)
            await self._metadata.relieve()
            async with self.ranges.held(start, piece_end):
                await self._metadata.writable_table(l1_index)
                self._forget_locked(start, (piece_end - start) // self.whole_size)
            start = piece_end

    def _forget_locked(self, start: int, cluster_count: int) -> None:
        self._publish(start, [0] * cluster_count)

    def _locked_range(self, start: int, end: int) -> tuple[int, int]:
        return align_down(start, self.whole_size), align_up(end, self.whole_size)

    async def _zero_locked(self, start: int, end: int, *, unmap: bool) -> None:
        """Turn whole clusters into zero clusters.

        Needs:    the range is held, and inside one table.
        """
        change = self._unmapped_zero if unmap else self._kept_zero
        table = await self._metadata.writable_table(start >> self._mapping.table_bits)
        index = (start >> self._mapping.cluster_bits) & self._mapping.index_mask
        count = (align_up(end, self._cluster_size) - start) >> self._mapping.cluster_bits
        self._publish(start, [change(entry) for entry in table.entries[index : index + count]])


def stored_run(entry: int, cluster_bits: int) -> Run:
    """The host clusters that an entry with a place names, compressed or not."""
    if not entry & COMPRESSED:
        return Run(entry & OFFSET_MASK, 1)
    offset, length = compressed_extent(entry, cluster_bits)
    first = align_down(offset, 1 << cluster_bits)
    return Run(first, (align_up(offset + length, 1 << cluster_bits) - first) >> cluster_bits)
