"""blkstream: copy-on-read into an active image, down to a final base.

What the guest reads and neither the active image nor the final base (or what is below it) holds is
copied into the active image, whole clusters at a time. A stream is nothing but this node's
`missing` and `populate` from 0 to the end, and then the final base written as the backing file.
Without a stream it is copy-on-read.

    guest read    in the image, or from the final base: straight through
                  else: copy what no stream is copying, then read the image, or from below it
    guest write   clusters of its own: straight through, no queue
                  else whole clusters: through the write queue (write_queue.py), which orders it with the
                  copies and lets it go first
                  else a part of a cluster: kept in memory until the source has delivered the rest, as long
                  as there is somebody who merges it (`keep_writes`: the stream)

What is kept (kept_parts.py) is what the guest finds; it is in the image when a flush is acknowledged.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from blockd.aio import Coalesced, task_group
from blockd.block.chain import layer_map, unfiltered
from blockd.block.node import BlockNode, Buffer, FillCounts, FilterNode, OverlayNode, Segment
from blockd.block.segments import can_read_blocking, zeroes
from blockd.errors import StorageError
from blockd.extents import Extent, Kind
from blockd.filters.guest_waits import GuestWaits
from blockd.filters.kept_parts import KeptCluster, KeptParts
from blockd.filters.write_queue import Copy, WriteQueue
from blockd.units import MIB, align_down, align_up

log = logging.getLogger(__name__)

# The most that a copy takes that is made for a guest: other guests' writes of parts of its clusters may have
# to wait for it where nothing is kept.
COPY_LENGTH_MAX = 4 * MIB
# How many merges may read the source in threads at once, which guests need too. As many as there are kept
# parts may wait for a source that needs no thread: one over a network, say.
MERGE_THREAD_COUNT = 128

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
        self.guest_waits = GuestWaits()
        self._queue = WriteQueue(active.cluster_size)
        self._kept = KeptParts(active.cluster_size)
        self._is_keeping = False
        self._merge_threads = asyncio.Semaphore(MERGE_THREAD_COUNT)
        self._merge_all = Coalesced(self._merge_all_once)

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

        Needs:    offset is a multiple of the cluster size; the end too, or the disk's end.
        Raises:   StorageError: reading or writing failed; what was there is unchanged.
        """
        end = align_up(offset + length, self.cluster_size)
        async with self._queue.copying(offset, end, is_for_guest=keep_cached) as copy:
            source = await self._plan(copy)
            counts = await self._fill(copy, source, keep_cached=keep_cached)
        if self._kept:
            await self._land(offset, end)
        return counts

    async def _plan(self, copy: Copy) -> list[Segment]:
        assert self.active.backing is not None, "nothing can be missing without a backing"
        return await self.active.plan_read(copy.start, min(copy.end, self.size) - copy.start)

    async def _fill(self, copy: Copy, source: list[Segment], *, keep_cached: bool) -> FillCounts:
        length = min(copy.end, self.size) - copy.start
        return await self.active.fill(copy.start, length, source, copy.is_wanted, keep_cached=keep_cached)

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
        """Copy what no stream is copying: that takes longer than to read it from below once more."""
        end = extent.offset
        while parts := self._queue.uncopied(end, extent.end):
            start, part_end = parts[0]
            end = min(part_end, start + COPY_LENGTH_MAX)
            try:
                await self.populate(start, end - start, keep_cached=True)
            except StorageError as error:
                # The guest asked to read: it gets its data from below, or that read's own error.
                log.warning("copy-on-read of %s at %d failed: %s", self.filename, start, error.message)

    # -- guest reads --------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        self.guest_waits.tried_count += 1
        if self._kept and self._kept.touches(offset, offset + length):
            return None
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
        # What is kept now: later it may be in the image, or written over, and either is right for this read.
        kept = self._kept.pieces(offset, length) if self._kept else []
        if not kept:
            return await self._read_copying(offset, length)
        content = bytearray(length)
        position = offset
        for start, data in [*kept, (offset + length, b"")]:
            if position < start:
                content[position - offset : start - offset] = await self._read_copying(
                    position, start - position
                )
            position = start + len(data)
            content[start - offset : position - offset] = data
        return content

    async def _read_copying(self, offset: int, length: int) -> Buffer:
        await self._copy_on_read(offset, length)
        with self.guest_waits.waiting():
            return await self.active.read(offset, length)

    # What looks at the image past this node sees nothing of what is kept.

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        await self._merge_range(offset, offset + length)
        return await self.active.plan_read(offset, length)

    async def map(self, offset: int, length: int) -> list[Extent]:
        await self._merge_range(offset, offset + length)
        return await self.active.map(offset, length)

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        is_kept = self._kept and self._kept.touches(offset, offset + length)
        return None if is_kept else self.active.kind_nowait(offset, length)

    # -- guest writes -------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self.guest_waits.tried_count += 1
        if self._kept and self._kept.touches(offset, offset + len(data)):
            return False
        # What is written without waiting is in the map at once: a copy in flight finds it and leaves it.
        if self.active.write_nowait(offset, data):
            self.guest_written += len(data)
            return True
        return False

    async def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        start, end = await self._keep_parts(
            offset, offset + len(data), lambda low, high: view[low - offset : high - offset]
        )
        if start < end:
            async with self._queue.writing(start, self._write_end(end)):
                with self.guest_waits.waiting():
                    await self.active.write(start, view[start - offset : end - offset])
                self._drop_kept(start, end)
        self.guest_written += len(data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        start, end = await self._keep_parts(offset, offset + length, lambda low, high: zeroes(high - low))
        if start < end:
            async with self._queue.writing(start, self._write_end(end)):
                await self.active.write_zeroes(start, end - start, unmap=unmap)
                self._drop_kept(start, end)

    async def discard(self, offset: int, length: int) -> None:
        """Give back whole clusters; those of which a part is kept become zeroes, not what is below again."""
        start = align_up(offset, self.cluster_size)
        end = align_down(self._write_end(offset + length), self.cluster_size)
        if start >= end:
            return
        async with self._queue.writing(start, end):
            length = min(end, self.size) - start
            if self._kept.touches(start, end):
                await self.active.write_zeroes(start, length)
                self._kept.drop(start, end)
            else:
                await self.active.discard(start, length)

    def _write_end(self, end: int) -> int:
        """A write up to the disk's end covers its last cluster, whole or not."""
        return align_up(end, self.cluster_size) if end == self.size else end

    def _drop_kept(self, start: int, end: int) -> None:
        """What was kept of the whole clusters in a range has been written over."""
        first = align_up(start, self.cluster_size)
        last = align_down(self._write_end(end), self.cluster_size)
        if self._kept and first < last:
            self._kept.drop(first, last)

    # -- keeping parts of clusters ------------------------------------------------------------

    async def _keep_parts(self, offset: int, end: int, part: Callable[[int, int], Buffer]) -> tuple[int, int]:
        """Take care of the parts of clusters at both ends; returns the range that is left to be written."""
        start = offset
        first = min(align_up(start, self.cluster_size), end)
        last = align_down(self._write_end(end), self.cluster_size)
        if start < first and await self._keep_part(start, part(start, first)):
            start = first
        if max(start, first) <= last < end and await self._keep_part(last, part(last, end)):
            end = last
        return start, end

    async def _keep_part(self, offset: int, data: Buffer) -> bool:
        """Write a part of a cluster if that needs no waiting, or keep it; False: write it as any other.

        Raises:   StorageError: there is no room for it, and what is kept already cannot be merged.
        """
        start = align_down(offset, self.cluster_size)
        await self._queue.landed(start, start + self.cluster_size)
        if start not in self._kept:
            is_missing = await self._is_missing(start)
            if start in self._kept:
                return await self._keep_part(offset, data)
            if not is_missing:
                self._queue.cancel_copies(start, start + self.cluster_size)
                return False
            if self.active.write_nowait(offset, data):
                return True
        if self._is_keeping and self._kept.has_room(offset, len(data)):
            self._kept.put(offset, data)
            return True
        await self._merge_range(offset, offset + len(data))
        return False

    async def _is_missing(self, cluster_offset: int) -> bool:
        """Whether a cluster is not the image's own."""
        length = min(self.cluster_size, self.size - cluster_offset)
        first = (await self.active.map(cluster_offset, length))[0]
        return first.kind is Kind.UNALLOCATED and self.active.backing is not None

    async def keep_writes(self) -> None:
        """While this runs, parts of clusters are kept, and merged as soon as the source answers.

        A merge that fails is tried again by the next flush, which reports it, or by the stream.
        """
        self._is_keeping = True
        try:
            async with task_group() as tasks:
                while True:
                    tasks.create_task(self._merge_taken(*await self._kept.take(COPY_LENGTH_MAX)))
        finally:
            self._is_keeping = False

    async def _merge_taken(self, start: int, end: int) -> None:
        try:
            await self._merge(start, end)
        except StorageError as error:
            log.warning("%s: what was written at %d stays in memory: %s", self.filename, start, error.message)

    # -- merging ------------------------------------------------------------------------------

    async def flush(self) -> None:
        await self.settle()
        await self.active.flush()

    async def settle(self) -> None:
        """Merge what is kept now.

        Raises:   StorageError: some of it cannot be; it stays kept.
        """
        if self._kept:
            await self._merge_all()

    catch_up = settle

    async def let_go(self) -> StorageError | None:
        """Settle for the last time; returns why something that was acknowledged is lost, if it is."""
        try:
            await self.settle()
        except StorageError as error:
            self._kept.drop(0, self.size)
            return error
        return None

    async def _merge_all_once(self) -> None:
        """Merge what is kept now, all of it that can be."""
        errors: list[StorageError] = []

        async def merge(start: int, end: int) -> None:
            try:
                await self._merge(start, end)
            except StorageError as error:
                errors.append(error)

        async with task_group() as tasks:
            for start, end in self._kept.runs(COPY_LENGTH_MAX):
                tasks.create_task(merge(start, end))
        if errors:
            raise errors[0]

    async def _merge_range(self, start: int, end: int) -> None:
        if self._kept and self._kept.touches(start, end):
            for cluster in self._kept.clusters(start, end):
                await self._merge(cluster.offset, cluster.offset + self.cluster_size)

    async def _merge(self, start: int, end: int) -> None:
        """Put what is kept of a range of clusters into the image.

        Raises:   StorageError: copying or writing failed; all that is not in the image stays kept.
        """
        while self._kept.touches(start, end):
            for low, high in self._incomplete(start, end):
                async with self._queue.copying(low, high) as copy:
                    if self.active.backing is not None:
                        await self._copy_for_merge(copy)
            await self._land(start, end)

    def _incomplete(self, start: int, end: int) -> list[tuple[int, int]]:
        """The clusters of a range of which parts are kept, as ranges of neighbours.

        No others: a guest that writes to a part of one would wait for its copy, again and again, if it writes
        to a whole one besides, whose copy is therefore never finished.
        """
        ranges: list[tuple[int, int]] = []
        for cluster in self._kept.clusters(start, end):
            if not self._is_whole(cluster):
                is_next = bool(ranges) and ranges[-1][1] == cluster.offset
                first = ranges.pop()[0] if is_next else cluster.offset
                ranges.append((first, cluster.offset + self.cluster_size))
        return ranges

    async def _copy_for_merge(self, copy: Copy) -> None:
        source = await self._plan(copy)
        async with self._merge_threads if can_read_blocking(source) else contextlib.nullcontext():
            await self._fill(copy, source, keep_cached=True)

    async def _land(self, start: int, end: int) -> None:
        """Write what is kept of those clusters of a range that need nothing from below any more."""
        for offset in [cluster.offset for cluster in self._kept.clusters(start, end)]:
            cluster_end = offset + self.cluster_size
            async with self._queue.landing(offset, cluster_end):
                for cluster in self._kept.clusters(offset, cluster_end):  # unless it was written over
                    if self._is_whole(cluster) or not await self._is_missing(offset):
                        await self._write_pieces(cluster)
                        self._kept.drop(offset, cluster_end)

    def _is_whole(self, cluster: KeptCluster) -> bool:
        return cluster.covers(min(cluster.offset + self.cluster_size, self.size))

    async def _write_pieces(self, cluster: KeptCluster) -> None:
        for offset, data in cluster.pieces(cluster.offset, cluster.offset + self.cluster_size):
            if not self.active.write_nowait(offset, data):
                await self.active.write(offset, data)
