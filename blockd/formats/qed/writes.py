"""Guest writes that may change the map: allocation with copy-on-write, zeroes, discard.

A write to clusters that there are goes in place. For others new clusters are allocated, the parts of
them that the guest did not write are filled up with the old content, and when all is written the new map
entries are published at once.

Zeroes and discards leave clusters where they are and punch holes into them: the space is given back,
the map stays, and no cluster leaks, for a QED image has no list of free ones.
"""

import asyncio
from typing import TYPE_CHECKING

from blockd.aio import in_thread
from blockd.block.file_events import FileEvent
from blockd.block.node import Buffer
from blockd.block.segments import zeroes
from blockd.formats.qed.large_clusters import BUFFER_LENGTH, write_cluster
from blockd.formats.qed.mapping import UNALLOCATED, ZERO, Page
from blockd.formats.qed.metadata import Metadata
from blockd.range_lock import RangeLock
from blockd.units import align_down, align_up

if TYPE_CHECKING:
    from blockd.formats.qed.image import QedImage

# One allocating write at most, so that the copy of its edges and the wait behind it stay short.
ALLOCATING_WRITE_LENGTH_MAX = BUFFER_LENGTH
# How many clusters are zeroed before others get their turn.
ZEROED_AT_ONCE_MAX = 1024


class GuestWrites:
    """The write side of one image.

    Locks:    `ranges` is held, cluster aligned, while the map of a range is being changed; it comes
              before the metadata lock.
    """

    def __init__(self, image: "QedImage", metadata: Metadata) -> None:
        self._image = image
        self._metadata = metadata
        self._mapping = metadata.mapping
        self._allocator = metadata.allocator
        self._cluster_size = metadata.header.cluster_size
        self.ranges = RangeLock()

    def is_in_flight(self, offset: int, length: int) -> bool:
        """Whether the map of any part of the range is being changed."""
        return bool(self.ranges) and self.ranges.overlaps(offset, offset + length)

    # -- data ---------------------------------------------------------------------------------

    def write_new_nowait(self, offset: int, data: Buffer) -> bool:
        """Write to a cluster that holds no data so far, if all that this takes is in memory.

        Locks:    none: from looking the cluster up to publishing it nothing is waited for.
        """
        start = align_down(offset, self._cluster_size)
        number = start >> self._mapping.page_bits
        page = self._mapping.pages.get(number)
        if page is None or offset + len(data) > start + self._cluster_size:
            return False
        if page.entries[self._index(start)] > ZERO or self._metadata.needs_relief:
            return False
        content = self._merged_nowait(start, offset, data)
        if content is None:
            return False
        run = self._allocator.allocate(1)
        if not self._image.file.write_nowait(run.host_offset, content):
            self._allocator.give_back(run)
            return False
        self._mapping.set_entries(number, page, self._index(start), [run.host_offset])
        return True

    def _merged_nowait(self, start: int, offset: int, data: Buffer) -> Buffer | None:
        """The content of a whole cluster with `data` in it, if that needs no waiting."""
        if len(data) == self._cluster_size:
            return data
        stored = min(self._cluster_size, self._image.size - start)
        old = self._image.read_nowait(start, stored)
        if old is None:
            return None
        content = old if isinstance(old, bytearray) else bytearray(old)
        content[offset - start : offset - start + len(data)] = data
        return content if stored == self._cluster_size else content.ljust(self._cluster_size, b"\0")

    async def write(self, offset: int, data: memoryview) -> None:
        """Write, in place or to new clusters, piece by piece."""
        while data:
            number = offset >> self._mapping.page_bits
            piece = data[: ((number + 1) << self._mapping.page_bits) - offset]
            await self.ranges.wait(offset, offset + len(piece))
            page = await self._mapping.page(number)
            entry, count = self._prefix(page, offset, len(piece))
            if entry > ZERO:
                host_offset = entry | offset % self._cluster_size
                self._image.require_data(offset, host_offset, count)
                await self._write_in_place(host_offset, piece[:count])
            else:
                count = await self._write_allocating(offset, piece)
            offset += count
            data = data[count:]

    def _prefix(self, page: Page | None, offset: int, length: int) -> tuple[int, int]:
        """The entry at `offset`, and how much from there on is one run of data, or holds no data."""
        if page is None:
            return UNALLOCATED, length
        runs = self._image.page_runs(page, offset, offset + length)
        _, count, entry = next(runs)
        if entry <= ZERO:
            for _, more, following in runs:
                if following > ZERO:
                    break
                count += more
        return entry, count

    def _index(self, offset: int) -> int:
        return (offset >> self._mapping.cluster_bits) & self._mapping.index_mask

    async def _write_in_place(self, host_offset: int, data: memoryview) -> None:
        file = self._image.file
        if not file.write_nowait(host_offset, data):
            file.announce(FileEvent.WRITE_AIO)
            await file.write(host_offset, data)

    async def _write_allocating(self, offset: int, data: memoryview) -> int:
        """Write the first part of `data` to new clusters; 0 means the map changed meanwhile."""
        await self._metadata.relieve()
        start = align_down(offset, self._cluster_size)
        data = data[: start + max(ALLOCATING_WRITE_LENGTH_MAX, self._cluster_size) - offset]
        number = start >> self._mapping.page_bits
        async with self.ranges.held(start, align_up(offset + len(data), self._cluster_size)):
            entry, count = self._prefix(await self._mapping.page(number), offset, len(data))
            if entry > ZERO:
                return 0
            self._image.file.announce(FileEvent.CLUSTER_ALLOC)
            run = self._allocator.allocate(
                (align_up(offset + count, self._cluster_size) - start) // self._cluster_size
            )
            data = data[: min(count, start + run.cluster_count * self._cluster_size - offset)]
            try:
                if self._cluster_size > BUFFER_LENGTH:
                    await write_cluster(self._image, run, offset, data)
                else:
                    await self._write_in_place(run.host_offset, await self._with_edges(offset, data))
                page = await self._metadata.writable_page(number)
            except BaseException:
                self._allocator.give_back(run)
                raise
            end = run.host_offset + run.cluster_count * self._cluster_size
            entries = list(range(run.host_offset, end, self._cluster_size))
            self._mapping.set_entries(number, page, self._index(start), entries)
        return len(data)

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

    # -- zeroes and discard -------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make whole clusters read as zeroes, and write zeroes to the parts at both ends."""
        end = offset + length
        first = min(align_up(offset, self._cluster_size), end)
        last = max(self._cluster_end(end), first)
        await self._zero_part(offset, first)
        await self._zero_clusters(first, last, unmap=unmap)
        await self._zero_part(last, end)

    async def discard(self, offset: int, length: int) -> None:
        """Give back the space of the whole clusters of the range."""
        first = align_up(offset, self._cluster_size)
        await self._zero_clusters(first, self._cluster_end(offset + length), unmap=True)

    def _cluster_end(self, end: int) -> int:
        """The end of the last whole cluster; the disk's end completes its cluster."""
        return end if end == self._image.size else align_down(end, self._cluster_size)

    async def _zero_part(self, start: int, end: int) -> None:
        while start < end and not self._reads_as_zero(self._image.entry_nowait(start, end - start)):
            length = min(end - start, BUFFER_LENGTH)
            await self.write(start, memoryview(zeroes(length)))
            start += length

    def _reads_as_zero(self, entry: int) -> bool:
        return entry == ZERO or (entry == UNALLOCATED and not self._image.is_backed)

    async def _zero_clusters(self, start: int, end: int, *, unmap: bool) -> None:
        """Make whole clusters read as zeroes, a part of a page at a time, with others' turns between."""
        while start < end:
            number = start >> self._mapping.page_bits
            piece_end = start + ZEROED_AT_ONCE_MAX * self._cluster_size
            piece_end = min(end, (number + 1) << self._mapping.page_bits, piece_end)
            await asyncio.sleep(0)
            await self._metadata.relieve()
            async with self.ranges.held(start, align_up(piece_end, self._cluster_size)):
                await self._zero_page(number, start, piece_end, unmap=unmap)
            start = piece_end

    async def _zero_page(self, number: int, start: int, end: int, *, unmap: bool) -> None:
        """Put zero entries where there is no data, and holes where there is.

        Needs:    the range is held, and inside the page.
        """
        page = await self._mapping.page(number)
        end = align_up(end, self._cluster_size)
        is_backed = self._image.is_backed
        if page is None and not is_backed:
            return
        page = await self._metadata.writable_page(number)
        stored: list[tuple[int, int]] = []
        for offset, length, entry in list(self._image.page_runs(page, start, end)):
            if entry > ZERO:
                self._image.require_data(offset, entry, length)
                stored.append((entry, length))
            elif entry == UNALLOCATED and is_backed:
                zero_entries = [ZERO] * (length >> self._mapping.cluster_bits)
                self._mapping.set_entries(number, page, self._index(offset), zero_entries)
        if stored and unmap:
            await in_thread(self._punch_blocking, stored)
        elif stored:
            for host_offset, length in stored:
                await self._image.file.write_zeroes(host_offset, length, unmap=False)

    def _punch_blocking(self, stored: list[tuple[int, int]]) -> None:
        for host_offset, length in stored:
            self._image.file.punch_hole_blocking(host_offset, length)
