"""blkstream: copy-on-read into an active image, down to a final base.

What the guest reads and neither the active image nor the final base (or what is below it) holds is
copied into the active image, whole clusters at a time. A stream is nothing but this node's
`missing` and `populate` from 0 to the end, and then the final base written as the backing file.
Without a stream it is copy-on-read.

    guest read    in the image, or from the final base: straight through
                  else: copy, then read the image
    guest write   clusters of its own: straight through, no queue
                  else: through the write queue (write_queue.py), which orders it with the copies
"""

import logging

from blockd.block.chain import layer_map, unfiltered
from blockd.block.node import BlockNode, Buffer, FillCounts, FilterNode, OverlayNode
from blockd.errors import StorageError
from blockd.extents import Extent, Kind
from blockd.filters.write_queue import WriteQueue
from blockd.units import MIB, align_down, align_up

log = logging.getLogger(__name__)

# The most that one copy takes: a guest write into part of a cluster may have to wait for it.
COPY_LENGTH_MAX = 4 * MIB

_DATA = (Kind.DATA,)
_DATA_AND_ZERO = (Kind.DATA, Kind.ZERO)


class BlkStream(FilterNode):
    """The filter over one active image; `base` None copies everything."""

    driver = "blkstream"

    def __init__(self, active: OverlayNode, base: BlockNode | None, node_name: str) -> None:
        super().__init__(active, node_name=node_name)
        self.active = active
        self.base = base
        self.guest_written = 0
        self._queue = WriteQueue(active.cluster_size)

    # -- copying ------------------------------------------------------------------------------

    async def missing(self, offset: int, length: int) -> list[Extent]:
        """Tell which clusters have to be copied.

        Shape:    extents in order from `offset`: DATA has to be copied, UNALLOCATED not. Ends on
                  cluster borders or the disk's end. May stop before the end of the range.
        Needs:    offset is a multiple of the cluster size.
        """
        # Without a base, zeroes of the backing need no copy: unallocated reads as zeroes in the end.
        return await self._missing(offset, length, _DATA if self.base is None else _DATA_AND_ZERO)

    async def _missing(self, offset: int, length: int, kinds: tuple[Kind, ...]) -> list[Extent]:
        """Tell the same about what is of these kinds below."""
        own = await self.active.map(offset, length)
        first = own[0]
        if first.kind is not Kind.UNALLOCATED or self.active.backing is None:
            return [self._extent(first.offset, first.end, is_needed=False)]
        below = await layer_map(self.active.backing, self.base, first.offset, first.length)
        found: list[Extent] = []
        for extent in below:
            start = found[-1].end if found else first.offset
            is_needed = extent.kind in kinds
            end = self._align_end(extent.end, up=is_needed)
            if start < end:
                found.append(self._extent(start, end, is_needed=is_needed))
        # Less than a cluster was looked at: taking it for needed costs a copy at most.
        return found or [self._extent(first.offset, self._align_end(below[-1].end, up=True), is_needed=True)]

    def _align_end(self, end: int, *, up: bool) -> int:
        if end >= self.size:
            return self.size
        return align_up(end, self.cluster_size) if up else align_down(end, self.cluster_size)

    def _extent(self, start: int, end: int, *, is_needed: bool) -> Extent:
        return Extent(start, min(end, self.size) - start, Kind.DATA if is_needed else Kind.UNALLOCATED)

    async def populate(self, offset: int, length: int, *, keep_cached: bool = False) -> FillCounts:
        """Copy what the active image still lacks of a range that is `missing`.

        `keep_cached`: a guest is about to read it.

        Needs:    offset is a multiple of the cluster size; the end too, or the disk's end;
                  length <= COPY_LENGTH_MAX.
        Raises:   StorageError: reading or writing failed; what was there is unchanged.
        """
        backing = self.active.backing
        assert backing is not None, "nothing can be missing without a backing"
        async with self._queue.copying(offset, align_up(offset + length, self.cluster_size)) as copy:
            source = await self.active.plan_read(offset, length)
            return await self.active.fill(offset, length, source, copy.is_wanted, keep_cached=keep_cached)

    async def _copy_on_read(self, offset: int, length: int) -> None:
        end = min(align_up(offset + length, self.cluster_size), self.size)
        position = align_down(offset, self.cluster_size)
        while position < end:
            # Holes of the backing, too: once recorded as zero, they are not asked for again.
            for extent in await self._missing(position, end - position, _DATA_AND_ZERO):
                if extent.kind is Kind.DATA:
                    await self._populate_pieces(extent)
                position = extent.end

    async def _populate_pieces(self, extent: Extent) -> None:
        for start in range(extent.offset, extent.end, COPY_LENGTH_MAX):
            try:
                await self.populate(start, min(COPY_LENGTH_MAX, extent.end - start), keep_cached=True)
            except StorageError as error:
                # The guest asked to read: it gets its data from below, or that read's own error.
                log.warning("copy-on-read of %s at %d failed: %s", self.filename, start, error.message)

    # -- guest requests -----------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        data = self.active.read_own_nowait(offset, length)
        if data is None and self.base is not None:
            return self._read_base_nowait(self.base, offset, length)
        return data

    def _read_base_nowait(self, base: BlockNode, offset: int, length: int) -> Buffer | None:
        node: BlockNode = self.active
        while unfiltered(node) is not base:
            below = unfiltered(node).backing
            is_below = offset + length <= node.size and node.kind_nowait(offset, length) is Kind.UNALLOCATED
            if below is None or not is_below:
                return None
            node = below
        # With the filters in front of it: a limit on the base holds for these reads too.
        return node.read_nowait(offset, length) if offset + length <= node.size else None

    async def read(self, offset: int, length: int) -> Buffer:
        await self._copy_on_read(offset, length)
        return await self.active.read(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        # What is written without waiting is in the map at once: a copy in flight finds it and leaves it.
        if self.active.write_nowait(offset, data):
            self.guest_written += len(data)
            return True
        return False

    async def write(self, offset: int, data: Buffer) -> None:
        async with self._queue.writing(offset, self._write_end(offset + len(data))):
            await self.active.write(offset, data)
        self.guest_written += len(data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        async with self._queue.writing(offset, self._write_end(offset + length)):
            await self.active.write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        async with self._queue.writing(offset, self._write_end(offset + length)):
            await self.active.discard(offset, length)

    def _write_end(self, end: int) -> int:
        """A write up to the disk's end covers its last cluster, whole or not."""
        return align_up(end, self.cluster_size) if end == self.size else end
