"""All tables of one image, changed together: lookups, allocation, checkpoints, growing tables."""

import asyncio
import errno
import logging
import struct
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from blockd.aio import Coalesced, in_thread, uninterrupted
from blockd.block.file_events import FileEvent
from blockd.block.node import ProtocolNode
from blockd.errors import ImageError, RequestError, StorageError
from blockd.formats.early_read import read_early
from blockd.formats.qcow2 import checkpoint, snapshots
from blockd.formats.qcow2 import header as headers
from blockd.formats.qcow2.allocator import Allocator
from blockd.formats.qcow2.copy_places import CopyPlaces
from blockd.formats.qcow2.corruption import Corruption
from blockd.formats.qcow2.header import Header
from blockd.formats.qcow2.mapping import COPIED, OFFSET_MASK, L2Table, Mapping, TableWrite, unpack_entries
from blockd.formats.qcow2.runs import Run, clusters_for
from blockd.formats.qcow2.snapshots import NO_SNAPSHOTS, SnapshotTable
from blockd.units import KIB, MIB

if TYPE_CHECKING:
    from blockd.formats.qcow2.leaks import LeakSearch

log = logging.getLogger(__name__)

_IN_USE = headers.AUTOCLEAR_IN_USE
# How much of a file is read for its header, unless its clusters are larger.
_FIRST_LENGTH = 64 * KIB
# By so much a file of version 2 is longer than its refcounts tell, at first, while it is in use.
_MARK_LENGTH = 1 * MIB
# Tables with so many entries in all are gone through on the loop, in 2 ms at most: a thread takes longer.
_SHORT_ENTRY_COUNT = 16_384


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
        self.copy_places = CopyPlaces(self.allocator)
        # Whether the header says that the image is in use, if it can. Nothing is allocated before that.
        self.is_marked = header.version < headers.ZERO_VERSION or bool(header.autoclear & _IN_USE)
        # There may be leaks, which were not looked for: the mark stays. They may be looked for beside guests.
        self.is_suspect = False
        self.leak_search: LeakSearch | None = None
        # The file is not cut below: if refcounts are wrong, clusters of before may be in use all the same.
        self.kept_end = file.size
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
                # Few images need it, and it is slow to load.
                from blockd.formats.qcow2.repair import repair_before_writing  # noqa: PLC0415

                await repair_before_writing(file)
                header = await _load_header(file)
        metadata = await cls._load_tables(file, header, read_only=read_only)
        if read_only or not await metadata._was_left_open():
            return metadata
        from blockd.formats.qcow2 import leaks, repair  # noqa: PLC0415

        is_large = not repair.takes_a_moment(metadata._entry_count)
        if is_large or not (metadata.knows_zero or await file.disk_usage()):  # or it is on a device
            metadata.is_suspect = True
            if is_large:
                await leaks.cut_off_room(metadata)
            metadata.leak_search = await leaks.LeakSearch.prepare(metadata)
            return metadata
        is_looked_through = await repair.give_back_leaks(file)
        metadata = await cls._load_tables(file, await _load_header(file), read_only=False)
        metadata.is_suspect = not is_looked_through
        return metadata

    @classmethod
    async def _load_tables(cls, file: ProtocolNode, header: Header, *, read_only: bool) -> "Metadata":
        l1 = await _load_l1(file, header)
        file.announce(FileEvent.REFTABLE_LOAD)
        table_size = header.refcount_table_clusters * header.cluster_size
        refcounts = await _load_table(file, header.refcount_table_offset, table_size, "refcount table")
        snapshot_table = NO_SNAPSHOTS if read_only else await snapshots.load(file, header)
        named = partial(_metadata_clusters, header, l1, refcounts, snapshot_table)
        is_short = len(l1) + len(refcounts) <= _SHORT_ENTRY_COUNT
        reserved = named() if is_short else await in_thread(named)
        autoclear = header.autoclear & _IN_USE
        if header.autoclear != autoclear and not read_only:
            # Whoever set these bits relies on nobody else writing to the image.
            field = struct.pack(">Q", autoclear)
            await in_thread(checkpoint.write_header_field, file, headers.AUTOCLEAR_FIELD, field)
            header = replace(header, autoclear=autoclear)
        return cls(file, header, l1, refcounts, snapshot_table, reserved=reserved)

    async def _was_left_open(self) -> bool:
        """Whether who wrote to the image last did not close it.

        Version 2 has no place to say so. Its file is longer than the refcounts tell then: see `_stay_longer`.
        """
        if self.knows_zero:
            return bool(self.header.autoclear & _IN_USE)
        try:
            return await self.allocator.used_end() < self.file.size  # as devices always are
        except Corruption:
            return False

    @property
    def _entry_count(self) -> int:
        """How many entries the tables that there are have."""
        table_count = len(self.mapping.l1) - self.mapping.l1.count(0)
        return table_count * self.header.cluster_size // self.header.l2_entry_size

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
        try:
            table = await mapping.table(l1_index)
        except BaseException:
            self.allocator.give_back(run)
            raise
        if table is not None and mapping.l1[l1_index] & COPIED:
            self.allocator.give_back(run)  # made by another writer meanwhile
            return table
        if table is not None:
            self.file.announce(FileEvent.L2_ALLOC_COW_READ)
            self.allocator.free(Run(table.host_offset, 1))
        return mapping.add_table(l1_index, run.host_offset)

    # -- checkpoints --------------------------------------------------------------------------

    async def relieve(self) -> None:
        """Prepare for changes: call before allocating, and before adding to what waits for a checkpoint."""
        if not self.is_marked:
            await self._mark()
        if self._is_under_pressure:
            await self.flush()

    @property
    def needs_relief(self) -> bool:
        """Whether `relieve` has something to do."""
        return not self.is_marked or self._is_under_pressure

    @property
    def _is_under_pressure(self) -> bool:
        return self.mapping.cache.is_under_pressure or self.allocator.is_under_pressure

    @uninterrupted
    async def _mark(self) -> None:
        """Let the header say, durably, that the image is in use: who finds that looks for leaks."""
        async with self.lock:
            if not self.is_marked:
                await self._set_autoclear(checkpoint.write_header_field, self.header.autoclear | _IN_USE)
                self.is_marked = True

    @uninterrupted
    async def _set_autoclear(self, write: Callable[[ProtocolNode, int, bytes], None], autoclear: int) -> None:
        await in_thread(write, self.file, headers.AUTOCLEAR_FIELD, struct.pack(">Q", autoclear))
        self.header = replace(self.header, autoclear=autoclear)

    async def _flush(self) -> None:
        async with self.lock:
            await self.checkpoint_locked()

    @uninterrupted
    async def checkpoint_locked(self) -> None:
        """Write all changes in order.

        Fails to: nothing is lost in memory; the next checkpoint writes it again.
        """
        freed = self.allocator.take_unmapped()
        refcounts = self.allocator.take_changes()
        maps = self.mapping.take_changes()
        try:
            if (refcounts.blocks or freed) and not self.knows_zero:
                await self._stay_longer()
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

    async def _stay_longer(self) -> None:
        """Let the file be longer than its refcounts are about to tell: version 2 has no other mark of use."""
        end = await self.allocator.used_end()
        if self.file.size <= end:
            await in_thread(checkpoint.lengthen, self.file, end, _MARK_LENGTH)

    async def _make_free(self, freed: list[Run]) -> None:
        """Bring clusters that the durable maps no longer name back into use."""
        try:
            await self.allocator.drop(freed)
        finally:
            self.allocator.put_back_unmapped(freed)  # empty unless dropping failed
        refcounts = self.allocator.take_changes()
        try:
            if not self.knows_zero:
                await self._stay_longer()
            await in_thread(checkpoint.write_refcounts, self.file, refcounts)
        except BaseException:
            self.allocator.changes_failed(refcounts)
            raise
        self.allocator.changes_written(refcounts)
        while runs := self.allocator.take_leaving():
            try:
                await in_thread(checkpoint.punch, self.file, runs, self.header.cluster_size)
            finally:
                self.allocator.release(runs)

    # -- unused space -------------------------------------------------------------------------

    async def trim(self) -> None:
        """Cut off what is unused at the end of the file, and give back what else is taken and not used.

        Needs:    nothing is in flight.
        """
        async with self.lock:
            if self.allocator.has_changes:  # a checkpoint has counted clusters that were given back since
                await self.checkpoint_locked()
            await self._trim_locked()

    @uninterrupted
    async def _trim_locked(self) -> None:
        self.copy_places.give_up()
        runs = self.allocator.take_unused()
        end = max(await self.allocator.used_end(), self.kept_end)
        await in_thread(self.file.trim_blocking, end)
        inside = [run for run in runs if run.host_offset < end]
        await in_thread(checkpoint.punch, self.file, inside, self.header.cluster_size)

    @uninterrupted
    async def settle(self) -> None:
        """Make everything durable, and leave the file no longer than it has to be, nor marked as in use.

        Needs:    nothing is in flight.
        """
        if self.leak_search is not None:
            await self.leak_search.stop()
        async with self.lock:
            await self.checkpoint_locked()
            try:
                await self._trim_locked()
            except StorageError as error:
                log.warning("'%s' stays longer than it has to be: %s", self.file.filename, error.message)
            if self.header.autoclear and not self.is_suspect:
                await self._set_autoclear(checkpoint.write_last_field, 0)
                self.is_marked = False

    # -- changing the header ------------------------------------------------------------------

    @uninterrupted
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

    async def plan_backing(self, filename: str | None, backing_format: str | None) -> headers.HeaderChange:
        """How the header is to record another backing file.

        Raises:   RequestError: there is no room for its name.
        """
        current = bytes(await self.file.read(0, self.header.cluster_size))
        # In a thread: a cluster may be 2 MiB, of which new ones are made.
        return await in_thread(headers.change_backing, current, self.header, filename, backing_format)

    @uninterrupted
    async def change_backing(self, filename: str | None, backing_format: str | None) -> None:
        """Make everything durable, then record another backing file, durably."""
        async with self.lock:
            await self.checkpoint_locked()
            change = await self.plan_backing(filename, backing_format)
            await in_thread(checkpoint.write_header_change, self.file, change.prepared, change.final)
            self.header = change.header

    @uninterrupted
    async def set_size(self, size: int) -> None:
        """Record another virtual size, durably.

        Needs:    an L1 table that is large enough.
        """
        async with self.lock:
            await self.checkpoint_locked()
            field = struct.pack(">Q", size)
            await in_thread(checkpoint.write_header_field, self.file, headers.SIZE_FIELD, field)
            self.header = replace(self.header, size=size)

    def require_resizable(self) -> None:
        """Refuse another size if a snapshot does not say how large it is: it would have that size too."""
        if any(snapshot.disk_size is None for snapshot in self.snapshots):
            raise RequestError(
                f"Can't resize '{self.file.filename}': it has snapshots that do not record their size"
            )

    async def grow_l1(self, size: int) -> None:
        """Make the L1 table large enough for a disk of `size` bytes.

        Raises:   RequestError: no L1 table can be that large.
        """
        entry_count = headers.l1_entry_count_for(size, self.header.cluster_bits, self.header.l2_entry_size)
        if entry_count * 8 > headers.L1_SIZE_MAX:
            raise RequestError(
                f"A qcow2 image with {self.header.cluster_size} byte clusters cannot be so large"
            )
        if entry_count <= self.header.l1_entry_count:
            return
        await self.relieve()
        self.file.announce(FileEvent.L1_GROW_ALLOC_TABLE)
        run = await self._allocate_contiguous(clusters_for(entry_count * 8, self.header.cluster_size))
        await self._use_for_l1(run, entry_count)

    @uninterrupted
    async def _use_for_l1(self, run: Run, entry_count: int) -> None:
        is_used = False
        async with self.lock:
            try:
                await self.checkpoint_locked()
                if entry_count > self.header.l1_entry_count:  # not grown by another one meanwhile
                    await self._move_l1(run, entry_count)
                    is_used = True
            finally:
                # A write that fails has changed nothing; after a sync that fails nothing is written any more.
                if not is_used:
                    self.allocator.give_back(run)

    @uninterrupted
    async def _move_l1(self, run: Run, entry_count: int) -> None:
        added = array("Q", bytes((entry_count - len(self.mapping.l1)) * 8))
        durable = self.mapping.linked_l1() + added
        field = struct.pack(">IQ", entry_count, run.host_offset)
        write = TableWrite(run.host_offset, durable)
        await in_thread(checkpoint.move_l1, self.file, write, field)
        old_clusters = clusters_for(self.header.l1_entry_count * 8, self.header.cluster_size)
        if old_clusters:
            old = Run(self.header.l1_offset, old_clusters)
            self.reserved.difference_update(self.allocator.host_offsets(old))
            self.allocator.free(old)
        self.reserved.update(self.allocator.host_offsets(run))
        self.mapping.l1.extend(added)
        self.mapping.l1_offset = run.host_offset
        self.header = replace(self.header, l1_offset=run.host_offset, l1_entry_count=entry_count)

    @uninterrupted
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
    clusters.update(entry & OFFSET_MASK for entry in filter(None, l1))
    clusters.update(entry & OFFSET_MASK for entry in filter(None, refcount_table))
    return clusters


async def _load_header(file: ProtocolNode) -> Header:
    first = bytes(await read_early(file, 0, max(1, min(file.size, _FIRST_LENGTH))))
    cluster_size = headers.cluster_size_of(first)
    if cluster_size > len(first) < file.size:
        first = bytes(await file.read(0, min(file.size, cluster_size)))
    return headers.parse(first, file.filename)


async def _load_l1(file: ProtocolNode, header: Header) -> "array[int]":
    l1_size = header.l1_entry_count * 8
    l1 = await _load_table(file, header.l1_offset, l1_size, "L1 table") if l1_size else array("Q")
    _require_few_tables(l1, file.filename)
    return l1


async def _load_table(file: ProtocolNode, host_offset: int, length: int, what: str) -> "array[int]":
    """Read a table that has to be inside the file: past its end is corrupt, never zeroes."""
    if host_offset + length > file.size:
        raise ImageError(f"'{file.filename}': the {what} at {host_offset:#x} runs past the end of the file")
    return unpack_entries(await read_early(file, host_offset, length))


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
