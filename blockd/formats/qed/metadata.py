"""All tables of one image, changed together: lookups, allocation, checkpoints, changes of the header."""

import asyncio
import struct
from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace

from blockd.aio import Coalesced, in_thread, uninterrupted
from blockd.block.node import ProtocolNode
from blockd.errors import ImageError, RequestError
from blockd.formats.early_read import read_early
from blockd.formats.qed import checkpoint
from blockd.formats.qed import header as headers
from blockd.formats.qed.allocator import Allocator, Run
from blockd.formats.qed.copy_places import CopyPlaces
from blockd.formats.qed.header import FEATURE_NEED_CHECK, Header
from blockd.formats.qed.mapping import ENTRY_SIZE, Mapping, Page, unpack_entries
from blockd.formats.qed.repair import recover
from blockd.units import SECTOR_SIZE


class Metadata:
    """The header, the map and the free clusters of one open image.

    Locks:    `lock` is held while metadata goes to the disk, and never across guest data I/O.
    """

    def __init__(
        self, file: ProtocolNode, header: Header, l1: "array[int]", free: Iterable[Run] = ()
    ) -> None:
        self.file = file
        self.header = header
        self.mapping = Mapping(file, header, l1)
        self.allocator = Allocator(file, header.cluster_size, free)
        self.copy_places = CopyPlaces(self.allocator)
        # Whether the header asks for a check on disk. Nothing is allocated before it does.
        self.is_marked = header.needs_check
        self.lock = asyncio.Lock()
        # Make everything that was written before the call durable, maps included.
        self.flush = Coalesced(self._flush)

    @classmethod
    async def load(cls, file: ProtocolNode, *, read_only: bool) -> "Metadata":
        """Read the header and the L1 table; for writing, check an image that needs it, and repair it.

        Raises:   ImageError: not a QED image, a field is wrong or not supported, or damage beyond repair.
        """
        header = await load_header(file)
        free: list[Run] = []
        if not read_only and header.needs_check:
            free = await recover(file)
            header = replace(header, features=header.features & ~FEATURE_NEED_CHECK)
        l1 = await load_l1(file, header, 0, headers.l1_entry_count_for(header.size, header))
        if header.autoclear and not read_only:
            # Whoever set these bits relies on nobody else writing to the image.
            await in_thread(checkpoint.write_header_field, file, headers.AUTOCLEAR_FIELD, bytes(8))
            header = replace(header, autoclear=0)
        return await in_thread(cls, file, header, l1, free)

    # -- allocating ---------------------------------------------------------------------------

    async def writable_page(self, number: int) -> Page:
        """The page for entries that are to be changed; with a new table if there is none."""
        page = await self.mapping.page(number)
        if page is None:
            run = self.allocator.allocate_fresh(self.header.table_size)
            self.mapping.add_table(number, run.host_offset)
            page = self.mapping.page_nowait(number)
            assert page is not None, "the pages of a new table are in memory"
        return page

    # -- checkpoints --------------------------------------------------------------------------

    async def relieve(self) -> None:
        """Prepare for changes: call before allocating, and before adding to what waits for a checkpoint."""
        if not self.is_marked:
            await self._mark()
        if self.mapping.cache.is_under_pressure:
            await self.flush()

    @property
    def needs_relief(self) -> bool:
        """Whether `relieve` has something to do."""
        return not self.is_marked or self.mapping.cache.is_under_pressure

    @uninterrupted
    async def _mark(self) -> None:
        """Let the header ask, durably, for a check of whoever opens the image after a crash."""
        async with self.lock:
            if not self.is_marked:
                features = self.header.features | FEATURE_NEED_CHECK
                await self._set_features(checkpoint.write_header_field, features)
                self.is_marked = True

    @uninterrupted
    async def _set_features(self, write: Callable[[ProtocolNode, int, bytes], None], features: int) -> None:
        await in_thread(write, self.file, headers.FEATURES_FIELD, struct.pack("<Q", features))
        self.header = replace(self.header, features=features)

    async def _flush(self) -> None:
        async with self.lock:
            await self.checkpoint_locked()

    @uninterrupted
    async def checkpoint_locked(self) -> None:
        """Write all changes in order.

        Fails to: nothing is lost in memory; the next checkpoint writes it again.
        """
        maps = self.mapping.take_changes()
        try:
            await in_thread(checkpoint.write_checkpoint, self.file, maps)
        except BaseException:
            self.mapping.changes_failed(maps)
            raise
        self.mapping.changes_written(maps)

    async def trim(self) -> None:
        """Cut free clusters off at the end of the file, and give back the space of the others.

        Needs:    nothing is in flight.
        Fails to: the file is as it was, or less of it takes space; all of it can be used as before.
        """
        async with self.lock:
            await self._trim_locked()

    @uninterrupted
    async def _trim_locked(self) -> None:
        end = self.allocator.used_end()
        if end < self.file.size:
            await in_thread(self.file.truncate_blocking, end)
        self.allocator.cut(end)
        await in_thread(self.file.trim_blocking, end)
        if free := self.allocator.free:
            await in_thread(checkpoint.punch, self.file, free, self.header.cluster_size)

    @uninterrupted
    async def settle(self) -> None:
        """Leave the file as if nobody had ever had it open: no free clusters, no need to check.

        QED has no list of free clusters. Those amid others are found again by a check alone, so the header
        goes on asking for one.

        Needs:    nothing is in flight.
        """
        async with self.lock:
            await self.checkpoint_locked()
            await self._trim_locked()
            if self.header.needs_check and not self.allocator.free:
                features = self.header.features & ~FEATURE_NEED_CHECK
                await self._set_features(checkpoint.write_last_field, features)
                self.is_marked = False

    # -- changing the header ------------------------------------------------------------------

    async def plan_backing(self, filename: str | None, backing_format: str | None) -> headers.HeaderChange:
        """How the header is to record another backing file.

        Raises:   RequestError: there is no room for its name.
        """
        current = bytes(await self.file.read(0, SECTOR_SIZE))
        return headers.change_backing(current, self.header, filename, backing_format)

    @uninterrupted
    async def change_backing(self, filename: str | None, backing_format: str | None) -> None:
        """Make everything durable, then record another backing file, durably."""
        async with self.lock:
            await self.checkpoint_locked()
            change = await self.plan_backing(filename, backing_format)
            await in_thread(checkpoint.write_header_change, self.file, change)
            self.header = change.header

    def require_size(self, size: int) -> None:
        """Refuse a size that the tables cannot map.

        Raises:   RequestError: it is too large.
        """
        largest = headers.size_max(self.header.cluster_size, self.header.table_size)
        if size > largest:
            raise RequestError(
                f"A QED image with {self.header.cluster_size} byte clusters and a table size of "
                f"{self.header.table_size} cannot be larger than {largest} bytes"
            )

    async def grow_l1(self, size: int) -> None:
        """Take as much of the L1 table into memory as a disk of `size` bytes uses."""
        count = headers.l1_entry_count_for(size, self.header)
        async with self.lock:
            present = len(self.mapping.l1)
            if count > present:
                self.mapping.extend_l1(await load_l1(self.file, self.header, present, count))

    @uninterrupted
    async def set_size(self, size: int) -> None:
        """Record another virtual size, durably."""
        async with self.lock:
            await self.checkpoint_locked()
            field = struct.pack("<Q", size)
            await in_thread(checkpoint.write_header_field, self.file, headers.SIZE_FIELD, field)
            self.header = replace(self.header, size=size)


async def load_header(file: ProtocolNode) -> Header:
    """Read the header, with the name of the backing file.

    Raises:   ImageError: not a QED image, or a field that is wrong or not supported.
    """
    first_sector = await read_early(file, 0, SECTOR_SIZE) if file.size >= SECTOR_SIZE else b""
    header = headers.parse(bytes(first_sector), file.filename)
    if header.l1_offset + header.table_length > file.size:
        raise ImageError(
            f"'{file.filename}': the L1 table at {header.l1_offset:#x} runs past the end of the file"
        )
    if header.features & headers.FEATURE_BACKING_FILE and header.backing_length:
        name = bytes(await read_early(file, header.backing_offset, header.backing_length))
        header = headers.with_backing(header, name)
    return header


async def load_l1(file: ProtocolNode, header: Header, start: int, end: int) -> "array[int]":
    """Read a range of the entries of the L1 table."""
    if start == end:
        return array("Q")
    data = await read_early(file, header.l1_offset + start * ENTRY_SIZE, (end - start) * ENTRY_SIZE)
    return unpack_entries(data)
