"""All tables of one image, changed together: lookups, allocation, checkpoints, growing tables."""

import asyncio
import errno
import logging
import struct
from array import array
from dataclasses import replace

from blockd.aio import Coalesced, in_thread
from blockd.block.file_events import FileEvent
from blockd.block.node import ProtocolNode
from blockd.errors import ImageError, RequestError, StorageError
from blockd.formats.qcow2 import checkpoint, snapshots
from blockd.formats.qcow2 import header as headers
from blockd.formats.qcow2.allocator import Allocator, Run
from blockd.formats.qcow2.header import Header
from blockd.formats.qcow2.mapping import COPIED, OFFSET_MASK, L2Table, Mapping, TableWrite, unpack_entries
from blockd.formats.qcow2.repair import repair_before_writing
from blockd.formats.qcow2.snapshots import NO_SNAPSHOTS, SnapshotTable

log = logging.getLogger(__name__)


class Metadata:
    """The header, the map and the refcounts of one open image.

    Locks:    `lock` is held while metadata goes to the disk, and never across guest data I/O.
    """

    def __init__(
        self,
        file: ProtocolNode,
        header: Header,
        l1: "array[int]",
        refcount_table: "array[int]",
        snapshot_table: SnapshotTable,
        *,
        reserved: set[int],
    ) -> None:
        self.file = file
        self.header = header
        self.snapshots = snapshot_table.snapshots
        # Host offsets of all clusters that hold metadata: no guest data is ever written there.
        self.reserved = reserved
        self.mapping = Mapping(file, header, l1, self.reserved)
        self.allocator = Allocator(file, header, refcount_table, self.reserved)
        self.lock = asyncio.Lock()
        # Make everything that was written before the call durable, maps included.
        self.flush = Coalesced(self._flush)

    @classmethod
    async def load(cls, file: ProtocolNode, *, read_only: bool) -> "Metadata":
        """Read the header and the tables that stay in memory; repair an image that was not closed cleanly.

        Raises:   ImageError: not a qcow2 image, or a field that is wrong or not supported.
        """
        header = await _load_header(file)
        if not read_only:
            _require_writable(header, file.filename)
            if header.incompatible & headers.INCOMPATIBLE_DIRTY:
                await repair_before_writing(file)
                header = await _load_header(file)
        l1_size = header.l1_entry_count * 8
        l1 = await _load_table(file, header.l1_offset, l1_size, "L1 table") if l1_size else array("Q")
        _require_few_tables(l1, file.filename)
        file.announce(FileEvent.REFTABLE_LOAD)
        table_size = header.refcount_table_clusters * header.cluster_size
        refcounts = await _load_table(file, header.refcount_table_offset, table_size, "refcount table")
        snapshot_table = NO_SNAPSHOTS if read_only else await snapshots.load(file, header)
        reserved = await in_thread(_metadata_clusters, header, l1, refcounts, snapshot_table)
        metadata = cls(file, header, l1, refcounts, snapshot_table, reserved=reserved)
        if header.autoclear and not read_only:
            # Whoever set these bits relies on nobody else writing to the image.
            await in_thread(checkpoint.write_header_field, file, headers.AUTOCLEAR_FIELD, bytes(8))
            metadata.header = replace(header, autoclear=0)
        return metadata

    @property
    def knows_zero(self) -> bool:
        """Whether the map can say that a cluster is zeroes."""
        return self.header.version >= headers.ZERO_VERSION

    def is_misplaced(self, host_offset: int) -> bool:
        """Whether no guest data can be in the cluster at `host_offset`: metadata, or nothing at all."""
        return host_offset in self.reserved or host_offset >= self.file.size

    # -- allocating ---------------------------------------------------------------------------

    async def allocate(self, cluster_count: int) -> Run:
        """Allocate neighbouring clusters, at least one and at most `cluster_count`."""
        self.file.announce(FileEvent.CLUSTER_ALLOC)
        while (run := self.allocator.allocate_nowait(cluster_count)) is None:
            if not await self.allocator.extend():
                await self._grow_refcount_table()
        return run

    async def _allocate_contiguous(self, cluster_count: int) -> Run:
        while (run := await self.allocator.allocate_contiguous(cluster_count)) is None:
            await self._grow_refcount_table()
        return run

    async def writable_table(self, l1_index: int) -> L2Table:
        """The L2 table for an entry that is to be changed; made if there is none, or only a shared one."""
        mapping = self.mapping
        table = await mapping.table(l1_index)
        if table is not None and mapping.l1[l1_index] & COPIED:
            return table
        run = await self.allocate(1)
        table = await mapping.table(l1_index)
        if table is not None and mapping.l1[l1_index] & COPIED:
            self.allocator.give_back(run)  # made by another writer meanwhile
            return table
        if table is not None:
            self.file.announce(FileEvent.L2_ALLOC_COW_READ)
            self.allocator.free(Run(table.host_offset, 1))
        return mapping.add_table(l1_index, run.host_offset)

    # -- checkpoints --------------------------------------------------------------------------

    async def relieve(self) -> None:
        """Make a checkpoint when too much waits for one; call before adding to what waits."""
        if self.is_under_pressure:
            await self.flush()

    @property
    def is_under_pressure(self) -> bool:
        """Whether a checkpoint is due."""
        return self.mapping.is_under_pressure or self.allocator.is_under_pressure

    async def _flush(self) -> None:
        async with self.lock:
            await self.checkpoint_locked()

    async def checkpoint_locked(self) -> None:
        """Write all changes in order.

        Fails to: nothing is lost in memory; the next checkpoint writes it again.
        """
        freed = self.allocator.take_unmapped()
        refcounts = self.allocator.take_changes()
        maps = self.mapping.take_changes()
        try:
            await in_thread(checkpoint.write_checkpoint, self.file, refcounts, maps)
        except BaseException:
            self.allocator.put_back_unmapped(freed)
            self.allocator.changes_failed(refcounts)
            self.mapping.changes_failed(maps)
            raise
        self.allocator.changes_written(refcounts)
        self.mapping.changes_written(maps)
        if freed or self.allocator.has_leaving:
            await self._make_free(freed)

    async def _make_free(self, freed: list[Run]) -> None:
        """Bring clusters that the durable maps no longer name back into use."""
        try:
            await self.allocator.drop(freed)
        finally:
            self.allocator.put_back_unmapped(freed)  # empty unless dropping failed
        refcounts = self.allocator.take_changes()
        try:
            await in_thread(checkpoint.write_refcounts, self.file, refcounts)
        except BaseException:
            self.allocator.changes_failed(refcounts)
            raise
        self.allocator.changes_written(refcounts)
        runs = self.allocator.take_leaving()
        try:
            await in_thread(checkpoint.punch, self.file, runs, self.header.cluster_size)
        finally:
            self.allocator.release(runs)

    # -- changing the header ------------------------------------------------------------------

    async def mark_corrupt(self) -> None:
        """Record that the tables are wrong, durably; best effort: whoever found out says so in any case."""
        if self.header.version < 3 or self.file.failed is not None:
            return  # version 2 has no place for it
        async with self.lock:
            incompatible = self.header.incompatible | headers.INCOMPATIBLE_CORRUPT
            field = struct.pack(">Q", incompatible)
            try:
                await in_thread(checkpoint.write_header_field, self.file, headers.INCOMPATIBLE_FIELD, field)
            except StorageError as error:
                log.warning("'%s' could not be marked corrupt: %s", self.file.filename, error.message)
                return
            self.header = replace(self.header, incompatible=incompatible)

    async def change_backing(self, filename: str | None, backing_format: str | None) -> None:
        """Make everything durable, then record another backing file, durably."""
        async with self.lock:
            await self.checkpoint_locked()
            current = bytes(await self.file.read(0, self.header.cluster_size))
            change = headers.change_backing(current, self.header, filename, backing_format)
            await in_thread(checkpoint.write_header_change, self.file, change.prepared, change.final)
            self.header = change.header

    async def set_size(self, size: int) -> None:
        """Record another virtual size, durably.

        Needs:    an L1 table that is large enough.
        """
        async with self.lock:
            await self.checkpoint_locked()
            field = struct.pack(">Q", size)
            await in_thread(checkpoint.write_header_field, self.file, headers.SIZE_FIELD, field)
            self.header = replace(self.header, size=size)

    async def grow_l1(self, size: int) -> None:
        """Make the L1 table large enough for a disk of `size` bytes.

        Raises:   RequestError: no L1 table can be that large, or a snapshot does not say how large it is.
        """
        if any(snapshot.disk_size is None for snapshot in self.snapshots):
            raise RequestError(
                f"Can't resize '{self.file.filename}': it has snapshots that do not record their size"
            )
        entry_count = headers.l1_entry_count_for(size, self.header.cluster_bits, self.header.l2_entry_size)
        if entry_count * 8 > headers.L1_SIZE_MAX:
            raise RequestError(
                f"A qcow2 image with {self.header.cluster_size} byte clusters cannot be so large"
            )
        if entry_count <= self.header.l1_entry_count:
            return
        self.file.announce(FileEvent.L1_GROW_ALLOC_TABLE)
        run = await self._allocate_contiguous(_clusters_for(entry_count * 8, self.header.cluster_size))
        async with self.lock:
            await self.checkpoint_locked()
            await self._move_l1(run, entry_count)

    async def _move_l1(self, run: Run, entry_count: int) -> None:
        added = array("Q", bytes((entry_count - len(self.mapping.l1)) * 8))
        durable = self.mapping.linked_l1() + added
        field = struct.pack(">IQ", entry_count, run.host_offset)
        write = TableWrite(run.host_offset, durable)
        await in_thread(checkpoint.move_l1, self.file, write, field)
        old_clusters = _clusters_for(self.header.l1_entry_count * 8, self.header.cluster_size)
        if old_clusters:
            old = Run(self.header.l1_offset, old_clusters)
            self.reserved.difference_update(self.allocator.host_offsets(old))
            self.allocator.free(old)
        self.reserved.update(self.allocator.host_offsets(run))
        self.mapping.l1.extend(added)
        self.mapping.l1_offset = run.host_offset
        self.header = replace(self.header, l1_offset=run.host_offset, l1_entry_count=entry_count)

    async def _grow_refcount_table(self) -> None:
        self.file.announce(FileEvent.REFTABLE_GROW)
        entry_count = len(self.allocator.table)
        async with self.lock:
            if len(self.allocator.table) > entry_count:
                return  # grown by another writer meanwhile
            larger = self.allocator.plan_larger_table()
            if larger.new.cluster_count * self.header.cluster_size > headers.REFCOUNT_TABLE_SIZE_MAX:
                raise StorageError(f"'{self.file.filename}' cannot grow any further", errno=errno.EFBIG)
            field = struct.pack(">QI", larger.new.host_offset, larger.new.cluster_count)
            await in_thread(checkpoint.move_refcount_table, self.file, larger.writes(), field)
            self.allocator.use_larger_table(larger)
            self.header = replace(
                self.header,
                refcount_table_offset=larger.new.host_offset,
                refcount_table_clusters=larger.new.cluster_count,
            )


def _metadata_clusters(
    header: Header, l1: "array[int]", refcount_table: "array[int]", snapshot_table: SnapshotTable
) -> set[int]:
    step = header.cluster_size
    l1_end = header.l1_offset + header.l1_entry_count * 8
    table_end = header.refcount_table_offset + header.refcount_table_clusters * step
    clusters = {
        0,
        *range(header.l1_offset, l1_end, step),
        *range(header.refcount_table_offset, table_end, step),
        *snapshot_table.clusters(header),
    }
    clusters.update(entry & OFFSET_MASK for entry in l1 if entry)
    clusters.update(entry & OFFSET_MASK for entry in refcount_table if entry)
    return clusters


def _clusters_for(length: int, cluster_size: int) -> int:
    return -(-length // cluster_size)


async def _load_header(file: ProtocolNode) -> Header:
    first = await file.read(0, max(1, min(file.size, 1 << headers.CLUSTER_BITS_MAX)))
    return headers.parse(bytes(first), file.filename)


async def _load_table(file: ProtocolNode, host_offset: int, length: int, what: str) -> "array[int]":
    """Read a table that has to be inside the file: past its end is corrupt, never zeroes."""
    if host_offset + length > file.size:
        raise ImageError(f"'{file.filename}': the {what} at {host_offset:#x} runs past the end of the file")
    return unpack_entries(await file.read(host_offset, length))


def _require_few_tables(l1: "array[int]", name: str) -> None:
    count = len(l1) - l1.count(0)
    if count > headers.L2_TABLE_COUNT_MAX:
        raise ImageError(
            f"'{name}': the L1 table names {count} L2 tables, more than {headers.L2_TABLE_COUNT_MAX}; "
            "an image of this size needs larger clusters"
        )


def _require_writable(header: Header, name: str) -> None:
    """Refuse to write to what this version could damage; reading it is fine."""
    reasons = (
        (
            header.incompatible & headers.INCOMPATIBLE_CORRUPT,
            "is marked corrupt; repair it with: blockctl image check --repair all",
        ),
    )
    for applies, reason in reasons:
        if applies:
            raise ImageError(f"'{name}' {reason}; it can be opened read-only")
