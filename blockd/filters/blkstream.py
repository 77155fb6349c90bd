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
                  else a part of a cluster: staged in memory until the source has delivered the rest, as long
                  as there is somebody who merges it (`run_staging`: the stream)

What is staged (staged_writes.py) is what the guest finds; it is in the image when a flush is acknowledged.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence

from blockd.aio import Coalesced, task_group
from blockd.block.chain import all_below, extents_below, plan_below, unfiltered
from blockd.block.guest_memory import guest_memory
from blockd.block.node import BlockNode, Buffer, FillCounts, FilterNode, OverlayNode, Segment
from blockd.block.permissions import WRITE_UNCHANGED, Access
from blockd.block.pins import pinned
from blockd.block.segments import SourcePlan, can_read_blocking, zeroes
from blockd.errors import StorageError
from blockd.extents import Extent, Kind, Range, total_length
from blockd.few_lines import FewLines
from blockd.filters.guest_waits import GuestWaits
from blockd.filters.staged_writes import StagedCluster, StagedWrites
from blockd.filters.write_queue import Copy, WriteQueue
from blockd.units import MIB, align_down, align_up

log = logging.getLogger(__name__)

# The most that a copy takes that is made for a guest: other guests' writes of parts of its clusters may have
# to wait for it where nothing is staged.
COPY_LENGTH_MAX = 4 * MIB
# How many merges may read the source in threads at once, which guests need too. As many as there are staged
# parts may wait for a source that needs no thread: one over a network, say.
MERGE_THREAD_COUNT = 128

# What a copy holds for each byte: what is read from a source that no thread can read, and what is written.
COPY_COST = 2

_DATA = (Kind.DATA,)
_DATA_AND_ZERO = (Kind.DATA, Kind.ZERO)


class BlkStream(FilterNode):
    """The filter over one active image; `base` None copies everything."""

    driver = "blkstream"

    def __init__(self, active: OverlayNode, base: BlockNode | None, node_name: str) -> None:
        super().__init__(active, node_name=node_name)
        self.active = active
        self.base = base
        # There was no base to begin with: what reads as zeroes without a backing is not copied.
        self.is_whole = base is None
        self.guest_written = 0
        self.guest_waits = GuestWaits()
        self._queue = WriteQueue(active.cluster_size)
        self._staged = StagedWrites(active.cluster_size)
        self._copy_failures, self._merge_failures = FewLines(log), FewLines(log)
        self._is_staging = False
        self._merge_threads = asyncio.Semaphore(MERGE_THREAD_COUNT)
        self._merge_all = Coalesced(self._merge_all_once)
        self._staging_error: StorageError | None = None

    def access_to(self, role: str, wanted: Access, *, read_only: bool) -> Access:
        return Access(wanted.need | WRITE_UNCHANGED, wanted.allow | WRITE_UNCHANGED)

    # -- copying ------------------------------------------------------------------------------

    @property
    def copies_in_order(self) -> bool:
        """Whether a stream copies one chunk after another, as a node below counts requests."""
        return any(node.counts_requests for node in all_below(self.active))

    async def missing(self, offset: int, length: int) -> list[Extent]:
        """Tell which clusters have to be copied.

        Shape:    extents in order from `offset`: DATA has to be copied, UNALLOCATED not. Ends on
                  cluster borders or the disk's end. May stop before the end of the range.
        Needs:    offset is a multiple of the cluster size.
        """
        with pinned(all_below(self.active)):
            return await self._missing(offset, length, _DATA if self.is_whole else _DATA_AND_ZERO)

    async def _missing(self, offset: int, length: int, kinds: tuple[Kind, ...]) -> list[Extent]:
        """Tell the same about what is of these kinds below."""
        lacking, end = await self.active.unallocated(offset, length)
        if self.active.backing is None or not lacking:
            return [Extent(offset, end - offset, Kind.UNALLOCATED)]
        below = await extents_below(lacking, self.active.backing, self.base)
        if below[-1].end < lacking[-1][1]:
            end = below[-1].end
        found: list[Extent] = []
        position, size, rest_mask = offset, self.size, self.cluster_size - 1
        for extent_offset, extent_length, kind in below:
            extent_end = extent_offset + extent_length
            if extent_end <= position or kind not in kinds:
                continue
            start = extent_offset & ~rest_mask
            if position < start:
                found.append(Extent(position, start - position, Kind.UNALLOCATED))
            elif found and found[-1].kind is Kind.DATA:
                start = found.pop().offset
            else:
                start = position
            position = extent_end + rest_mask & ~rest_mask
            position = min(position, size)
            found.append(Extent(start, position - start, Kind.DATA))
        end = end if end >= self.size else align_down(end, self.cluster_size)
        if position < end:
            found.append(Extent(position, end - position, Kind.UNALLOCATED))
        # Less than a cluster was looked at: taking it for needed costs a copy at most.
        return found or [Extent(offset, min(self.cluster_size, self.size - offset), Kind.DATA)]

    async def populate(self, ranges: Sequence[Range], *, keep_cached: bool = False) -> FillCounts:
        """Copy what the active image still lacks of some ranges that are `missing`.

        `keep_cached`: a guest is about to read it.

        Needs:    ranges in order; starts and ends are multiples of the cluster size, or the disk's end.
        Raises:   StorageError: reading or writing failed; what was there is unchanged.
        """
        whole = [(start, align_up(end, self.cluster_size)) for start, end in ranges]
        async with self._queue.copying(whole, is_for_guest=keep_cached) as copy:
            with pinned(all_below(self.active)):
                source = await plan_below(self.active, self._within_disk(copy))
                counts = await self._fill(copy, source, keep_cached=keep_cached)
        if self._staged:
            for start, end in whole:
                await self._land(start, end)
        return counts

    async def _fill(self, copy: Copy, source: SourcePlan, *, keep_cached: bool) -> FillCounts:
        ranges = self._within_disk(copy)
        return await self.active.fill(ranges, source, copy.is_wanted, keep_cached=keep_cached)

    def _within_disk(self, copy: Copy) -> Sequence[Range]:
        """The ranges of a copy, of which the last one may end behind the disk's end."""
        *others, (start, end) = copy.ranges
        return [*others, (start, min(end, self.size))]

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
                with guest_memory.tried(COPY_COST * (end - start)) as is_free:
                    if is_free:  # else the guest reads from below
                        await self.populate([(start, end)], keep_cached=True)
            except StorageError as error:
                # The guest asked to read: it gets its data from below, or that read's own error.
                self._copy_failures.warn(
                    "copy-on-read of %s at %d failed: %s", self.filename, start, error.message
                )

    # -- guest reads --------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        self.guest_waits.tried_count += 1
        if self._staged and self._staged.touches(offset, offset + length):
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
        # What is staged now: later it may be in the image, or written over; either is right for this read.
        staged = self._staged.pieces(offset, length) if self._staged else []
        if not staged:
            return await self._read_copying(offset, length)
        content = bytearray(length)
        position = offset
        for start, data in [*staged, (offset + length, b"")]:
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

    # What looks at the image past this node sees nothing of what is staged.

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        await self._merge_range(offset, offset + length)
        return await self.active.plan_read(offset, length)

    async def map(self, offset: int, length: int) -> list[Extent]:
        await self._merge_range(offset, offset + length)
        return await self.active.map(offset, length)

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        is_staged = self._staged and self._staged.touches(offset, offset + length)
        return None if is_staged else self.active.kind_nowait(offset, length)

    # -- guest writes -------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self.guest_waits.tried_count += 1
        if self._staged and self._staged.touches(offset, offset + len(data)):
            return False
        # What is written without waiting is in the map at once: a copy in flight finds it and leaves it.
        if self.active.write_nowait(offset, data):
            self.guest_written += len(data)
            return True
        return False

    async def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        start, end = await self._stage_ends(
            offset, offset + len(data), lambda low, high: view[low - offset : high - offset]
        )
        if start < end:
            async with self._queue.writing(start, self._write_end(end)):
                with self.guest_waits.waiting():
                    await self.active.write(start, view[start - offset : end - offset])
                self._drop_staged(start, end)
        self.guest_written += len(data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        start, end = await self._stage_ends(offset, offset + length, lambda low, high: zeroes(high - low))
        if start < end:
            async with self._queue.writing(start, self._write_end(end)):
                await self.active.write_zeroes(start, end - start, unmap=unmap)
                self._drop_staged(start, end)

    async def discard(self, offset: int, length: int) -> None:
        """Give back whole clusters; those of which a part is staged become zeroes, not what is below."""
        start = align_up(offset, self.cluster_size)
        end = align_down(self._write_end(offset + length), self.cluster_size)
        if start >= end:
            return
        async with self._queue.writing(start, end):
            length = min(end, self.size) - start
            if self._staged.touches(start, end):
                await self.active.write_zeroes(start, length)
                self._staged.drop(start, end)
            else:
                await self.active.discard(start, length)

    def _write_end(self, end: int) -> int:
        """A write up to the disk's end covers its last cluster, whole or not."""
        return align_up(end, self.cluster_size) if end == self.size else end

    def _drop_staged(self, start: int, end: int) -> None:
        """What was staged of the whole clusters in a range has been written over."""
        first = align_up(start, self.cluster_size)
        last = align_down(self._write_end(end), self.cluster_size)
        if self._staged and first < last:
            self._staged.drop(first, last)

    # -- keeping parts of clusters ------------------------------------------------------------

    async def _stage_ends(self, offset: int, end: int, part: Callable[[int, int], Buffer]) -> tuple[int, int]:
        """Take care of the parts of clusters at both ends; returns the range that is left to be written."""
        start = offset
        first = min(align_up(start, self.cluster_size), end)
        last = align_down(self._write_end(end), self.cluster_size)
        if start < first and await self._stage(start, part(start, first)):
            start = first
        if max(start, first) <= last < end and await self._stage(last, part(last, end)):
            end = last
        return start, end

    async def _stage(self, offset: int, data: Buffer) -> bool:
        """Write a part of a cluster if that needs no waiting, or keep it; False: write it as any other.

        Raises:   StorageError: there is no room for it, and what is staged already cannot be merged.
        """
        start = align_down(offset, self.cluster_size)
        await self._queue.landed(start, start + self.cluster_size)
        if start not in self._staged:
            is_missing = await self._is_missing(start)
            if start in self._staged:
                return await self._stage(offset, data)
            if not is_missing:
                self._queue.cancel_copies(start, start + self.cluster_size)
                return False
            if self.active.write_nowait(offset, data):
                return True
        if self._is_staging and self._staged.has_room(offset, len(data)):
            self._staged.put(offset, data)
            return True
        await self._merge_range(offset, offset + len(data))
        return False

    async def _is_missing(self, cluster_offset: int) -> bool:
        """Whether a cluster is not the image's own."""
        length = min(self.cluster_size, self.size - cluster_offset)
        first = (await self.active.map(cluster_offset, length))[0]
        return first.kind is Kind.UNALLOCATED and self.active.backing is not None

    def expect_staging(self, *, is_expected: bool) -> None:
        """Stage parts of clusters already, for `run_staging` is about to begin; or stage none any more."""
        self._is_staging = is_expected

    async def run_staging(self) -> None:
        """While this runs, parts of clusters are staged, and merged as soon as the source answers.

        A merge that fails is tried again by the next flush, which reports it, or by the stream.
        """
        self._is_staging = True
        try:
            async with task_group() as tasks:
                while True:
                    tasks.create_task(self._merge_taken(*await self._staged.take(COPY_LENGTH_MAX)))
        finally:
            self._is_staging = False

    async def _merge_taken(self, start: int, end: int) -> None:
        try:
            await self._merge(start, end)
        except StorageError as error:
            self._merge_failures.warn(
                "%s: what was written at %d stays in memory: %s", self.filename, start, error.message
            )

    # -- what is staged, when the stream is over ------------------------------------------------

    @property
    def staged_length(self) -> int:
        """How many bytes are staged."""
        return self._staged.length

    @property
    def staging_error(self) -> StorageError | None:
        """Why some of what is staged could not be merged when that was tried last."""
        return self._staging_error if self._staged else None

    def staged_pieces(self) -> list[tuple[int, Buffer]]:
        """All that is staged: offsets and data, in order."""
        return self._staged.pieces(0, self.size)

    async def stage_again(self, pieces: Iterable[tuple[int, Buffer]]) -> None:
        """Stage what an earlier run has kept, but for clusters that the image holds: what is there is newer.

        Needs:    no guest uses the filter yet.
        """
        for offset, data in pieces:
            is_inside = offset + len(data) <= self.size
            if is_inside and await self._is_missing(align_down(offset, self.cluster_size)):
                self._staged.put(offset, data)

    def begin_again(self, base: BlockNode | None, node_name: str) -> None:
        """Serve another stream, with what is staged.

        Needs:    no guest request is in flight.
        """
        self.base, self.is_whole = base, base is None
        self.node_name = node_name
        self.guest_written = 0
        self._staged.offer_again()

    def drop_staged(self) -> int:
        """Forget what is staged, which is lost then; tells how many bytes that was."""
        length = self._staged.length
        self._staged.drop(0, self.size)
        return length

    # -- merging ------------------------------------------------------------------------------

    async def flush(self) -> None:
        await self.flush_staged()
        await self.active.flush()

    async def flush_staged(self) -> None:
        """Merge what is staged now.

        Raises:   StorageError: some of it cannot be; it stays staged.
        """
        if self._staged:
            await self._merge_all()

    catch_up = flush_staged

    async def _merge_all_once(self) -> None:
        """Merge what is staged now, all of it that can be."""
        errors: list[StorageError] = []

        async def merge(start: int, end: int) -> None:
            try:
                await self._merge(start, end)
            except StorageError as error:
                errors.append(error)

        async with task_group() as tasks:
            for start, end in self._staged.runs(COPY_LENGTH_MAX):
                tasks.create_task(merge(start, end))
        if errors:
            raise errors[0]

    async def _merge_range(self, start: int, end: int) -> None:
        if self._staged and self._staged.touches(start, end):
            for cluster in self._staged.clusters(start, end):
                await self._merge(cluster.offset, cluster.offset + self.cluster_size)

    async def _merge(self, start: int, end: int) -> None:
        """Put what is staged of a range of clusters into the image.

        Raises:   StorageError: copying or writing failed; all that is not in the image stays staged.
        """
        try:
            while self._staged.touches(start, end):
                for low, high in self._incomplete(start, end):
                    async with self._queue.copying([(low, high)]) as copy:
                        if self.active.backing is not None:
                            await self._copy_for_merge(copy)
                await self._land(start, end)
        except StorageError as error:
            self._staging_error = error
            raise

    def _incomplete(self, start: int, end: int) -> list[tuple[int, int]]:
        """The clusters of a range of which parts are staged, as ranges of neighbours.

        No others: a guest that writes to a part of one would wait for its copy, again and again, if it writes
        to a whole one besides, whose copy is therefore never finished.
        """
        ranges: list[tuple[int, int]] = []
        for cluster in self._staged.clusters(start, end):
            if not self._is_whole(cluster):
                is_next = bool(ranges) and ranges[-1][1] == cluster.offset
                first = ranges.pop()[0] if is_next else cluster.offset
                ranges.append((first, cluster.offset + self.cluster_size))
        return ranges

    async def _copy_for_merge(self, copy: Copy) -> None:
        with pinned(all_below(self.active)):
            source = await plan_below(self.active, self._within_disk(copy))
            async with (
                guest_memory.reserved(COPY_COST * total_length(copy.ranges)),
                self._merge_threads if can_read_blocking(source.segments) else contextlib.nullcontext(),
            ):
                await self._fill(copy, source, keep_cached=True)

    async def _land(self, start: int, end: int) -> None:
        """Write what is staged of those clusters of a range that need nothing from below any more."""
        for offset in [cluster.offset for cluster in self._staged.clusters(start, end)]:
            cluster_end = offset + self.cluster_size
            async with self._queue.landing(offset, cluster_end):
                for cluster in self._staged.clusters(offset, cluster_end):  # unless it was written over
                    if self._is_whole(cluster) or not await self._is_missing(offset):
                        await self._write_pieces(cluster)
                        self._staged.drop(offset, cluster_end)

    def _is_whole(self, cluster: StagedCluster) -> bool:
        return cluster.covers(min(cluster.offset + self.cluster_size, self.size))

    async def _write_pieces(self, cluster: StagedCluster) -> None:
        for offset, data in cluster.pieces(cluster.offset, cluster.offset + self.cluster_size):
            if not self.active.write_nowait(offset, data):
                with pinned(all_below(self.active)):  # the rest of a cluster may come from below
                    await self.active.write(offset, data)


class CopyOnRead(BlkStream):
    """The same under QEMU's name for it, which the filters of jobs have, too."""

    driver = "copy-on-read"
