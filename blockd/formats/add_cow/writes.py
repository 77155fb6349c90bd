"""Guest writes that may have to bring a cluster into the image: copy-on-write, zeroes, discard.

A write to clusters that are in the image goes in place, at any time: a cluster that came into the
image stays there. Other clusters are written whole, the parts of them that the guest did not write filled
up with the old content, and only when all is written are their bits set.

A cluster has one place, so the copies of a stream go where guests write. Whoever brings a cluster into the
image holds its range meanwhile, and looks again whether it is still absent when the range is his.
"""

from typing import TYPE_CHECKING

from blockd.block.file_events import FileEvent
from blockd.block.node import Buffer
from blockd.block.segments import zeroes
from blockd.extents import Kind
from blockd.formats.add_cow.bitmap import ABSENT, PRESENT, page_end
from blockd.formats.add_cow.metadata import Metadata
from blockd.range_lock import RangeLock
from blockd.units import MIB, align_down, align_up

if TYPE_CHECKING:
    from blockd.formats.add_cow.image import AddCowImage

# One allocating write at most, so that the copy of its edges and the wait behind it stay short.
ALLOCATING_WRITE_LENGTH_MAX = 2 * MIB
# What is made zero at a time: others wait for it.
ZERO_LENGTH_MAX = 1024 * MIB


class GuestWrites:
    """The write side of one image.

    Locks:    `ranges` is held, cluster aligned, while absent clusters of a range are brought into the
              image; it comes before the metadata lock.
    """

    def __init__(self, image: "AddCowImage", metadata: Metadata) -> None:
        self._overlay = image
        self._image = image.image
        self._metadata = metadata
        self._bitmap = metadata.bitmap
        self._cluster_bits = metadata.header.cluster_bits
        self._cluster_size = metadata.header.cluster_size
        self.ranges = RangeLock()

    # -- data ---------------------------------------------------------------------------------

    def write_new_nowait(self, offset: int, data: Buffer) -> bool:
        """Write to one cluster that is absent so far, if all that this takes is in memory.

        Locks:    none: from looking the cluster up to setting its bit nothing is waited for.
        """
        start = align_down(offset, self._cluster_size)
        end = min(start + self._cluster_size, self._overlay.size)
        number = start >> self._cluster_bits
        if offset + len(data) > end or self._bitmap.state_nowait(number, number + 1) != ABSENT:
            return False
        if self._bitmap.cache.is_under_pressure or self.ranges.overlaps(start, end):
            return False
        content = self._merged_nowait(start, end, offset, data)
        if content is None or not self._image.write_nowait(start, content):
            return False
        self._bitmap.set_nowait(number, number + 1)
        return True

    def _merged_nowait(self, start: int, end: int, offset: int, data: Buffer) -> Buffer | None:
        """The content of a whole cluster with `data` in it, if that needs no waiting."""
        if len(data) == end - start:
            return data
        old = self._overlay.read_nowait(start, end - start)
        if old is None:
            return None
        content = old if isinstance(old, bytearray) else bytearray(old)
        content[offset - start : offset - start + len(data)] = data
        return content

    async def write(self, offset: int, data: memoryview) -> None:
        """Write, in place or to absent clusters, piece by piece."""
        end = offset + len(data)
        while offset < end:
            state, run_end = await self._run(offset, end)
            if state == PRESENT:
                piece = data[: run_end - offset]
                if not self._image.write_nowait(offset, piece):
                    await self._image.write(offset, piece)
            else:
                run_end = await self._write_absent(offset, run_end, data)
            data = data[run_end - offset :]
            offset = run_end

    async def _run(self, offset: int, end: int) -> tuple[int, int]:
        """Whether a range is in the image, and up to where that holds."""
        state, count = await self._overlay.run(offset, end - offset)
        return state, offset + count

    async def _write_absent(self, offset: int, end: int, data: memoryview) -> int:
        """Write the first part of `data` to clusters that were absent; returns up to where it did."""
        await self._metadata.relieve()
        start = align_down(offset, self._cluster_size)
        end = min(end, start + ALLOCATING_WRITE_LENGTH_MAX)
        async with self.ranges.held(start, align_up(end, self._cluster_size)):
            state, run_end = await self._run(offset, end)
            if state == PRESENT:
                return offset  # brought in by somebody else meanwhile
            await self._write_around(offset, data[: run_end - offset])
        return run_end

    async def _write_around(self, offset: int, data: memoryview) -> None:
        """Write absent clusters whole, with `data` in them, and set their bits.

        Needs:    their range is held.
        """
        end = offset + len(data)
        start = align_down(offset, self._cluster_size)
        stop = min(align_up(end, self._cluster_size), self._overlay.size)
        head = await self._old_content(start, offset)
        tail = await self._old_content(end, stop)
        content = memoryview(b"".join((head, data, tail))) if head or tail else data
        if not self._image.write_nowait(start, content):
            await self._image.write(start, content)
        await self._bitmap.set(start >> self._cluster_bits, -(-stop >> self._cluster_bits))

    async def _old_content(self, start: int, end: int) -> Buffer:
        if start >= end:
            return b""
        self._image.file.announce(FileEvent.COW_READ)
        content = self._overlay.read_nowait(start, end - start)
        return content if content is not None else await self._overlay.read(start, end - start)

    # -- zeroes and discard -------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make whole clusters zero in the image, and write zeroes to the parts at both ends."""
        end = offset + length
        first = min(align_up(offset, self._cluster_size), end)
        last = max(self._cluster_end(end), first)
        await self._zero_part(offset, first, unmap=unmap)
        await self._zero_clusters(first, last, unmap=unmap)
        await self._zero_part(last, end, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        """Give back the space of whole clusters, and of parts of those in the image."""
        end = offset + length
        first = min(align_up(offset, self._cluster_size), end)
        last = max(self._cluster_end(end), first)
        await self._discard_part(offset, first)
        await self._zero_clusters(first, last, unmap=True)
        await self._discard_part(last, end)

    def _cluster_end(self, end: int) -> int:
        """The end of the last whole cluster; the disk's end completes its cluster."""
        return end if end == self._overlay.size else align_down(end, self._cluster_size)

    async def _zero_part(self, start: int, end: int, *, unmap: bool) -> None:
        if start < end:
            if (await self._run(start, end))[0] == PRESENT:
                await self._image.write_zeroes(start, end - start, unmap=unmap)
            elif self._overlay.is_backed:
                await self.write(start, memoryview(zeroes(end - start)))

    async def _discard_part(self, start: int, end: int) -> None:
        if start < end and (await self._run(start, end))[0] == PRESENT:
            await self._image.discard(start, end - start)

    async def _zero_clusters(self, start: int, end: int, *, unmap: bool) -> None:
        """Make whole clusters zero, absent ones too; they are in the image then."""
        while start < end:
            await self._metadata.relieve()
            first = start >> self._cluster_bits
            piece_end = min(end, page_end(first) << self._cluster_bits, start + ZERO_LENGTH_MAX)
            async with self.ranges.held(start, align_up(piece_end, self._cluster_size)):
                await self._image.write_zeroes(start, piece_end - start, unmap=unmap)
                await self._bitmap.set(first, -(-piece_end >> self._cluster_bits))
            start = piece_end

    async def punch_absent(self) -> None:
        """Make absent clusters zero in the image's file: a crash or an error may have left anything there."""
        start, size = 0, self._overlay.size
        while start < size:
            state, end = await self._run(start, min(size, start + ZERO_LENGTH_MAX))
            if state == ABSENT:
                async with self.ranges.held(start, align_up(end, self._cluster_size)):
                    state, end = await self._run(start, end)
                    if state == ABSENT:
                        await self._punch_data(start, end)
            start = end

    async def _punch_data(self, start: int, end: int) -> None:
        """Make a range zero that mostly is."""
        while start < end:
            for extent in await self._image.map(start, end - start):
                if extent.kind is not Kind.ZERO:
                    await self._image.write_zeroes(extent.offset, extent.length)
                start = extent.end
