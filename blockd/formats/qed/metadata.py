"""All tables of one image, changed together: lookups, allocation, checkpoints, changes of the header."""

import asyncio
import struct
from array import array
from collections.abc import Iterable
from dataclasses import replace

from blockd.aio import Coalesced, in_thread
from blockd.block.node import ProtocolNode
from blockd.errors import ImageError, RequestError
from blockd.formats.qed import checkpoint
from blockd.formats.qed import header as headers
from blockd.formats.qed.allocator import Allocator, Run
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
        """Make a checkpoint when too much waits for one; call before adding to what waits."""
        if self.is_under_pressure:
            await self.flush()

    @property
    def is_under_pressure(self) -> bool:
        """Whether a checkpoint is due."""
        return self.mapping.is_under_pressure

    async def _flush(self) -> None:
        async with self.lock:
            await self.checkpoint_locked()

    async def checkpoint_locked(self) -> None:
        """Write all changes in order.

        Fails to: nothing is lost in memory; the next checkpoint writes it again.
        """
        maps = self.mapping.take_changes()
        header = self.header
        if header.backing_filename is None and not maps.is_empty:
            header = replace(header, features=header.features | FEATURE_NEED_CHECK)
        is_marking = header.features != self.header.features
        features = _packed_features(header) if is_marking else None
        try:
            await in_thread(checkpoint.write_checkpoint, self.file, features, maps)
        except BaseException:
            self.mapping.changes_failed(maps)
            raise
        self.header = header
        self.mapping.changes_written(maps)

    async def settle(self) -> None:
        """Leave the file as if nobody had ever had it open: no free clusters at its end, no need to check.

        Needs:    nothing is in flight.
        """
        async with self.lock:
            await self.checkpoint_locked()
            end = self.allocator.trim()
            if end is not None:
                await in_thread(self.file.truncate_blocking, end)
            if self.header.needs_check:
                header = replace(self.header, features=self.header.features & ~FEATURE_NEED_CHECK)
                field = _packed_features(header)
                await in_thread(checkpoint.write_header_field, self.file, headers.FEATURES_FIELD, field)
                self.header = header

    # -- changing the header ------------------------------------------------------------------

    async def change_backing(self, filename: str | None, backing_format: str | None) -> None:
        """Make everything durable, then record another backing file, durably."""
        async with self.lock:
            await self.checkpoint_locked()
            current = bytes(await self.file.read(0, SECTOR_SIZE))
            change = headers.change_backing(current, self.header, filename, backing_format)
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
    first_sector = await file.read(0, SECTOR_SIZE) if file.size >= SECTOR_SIZE else b""
    header = headers.parse(bytes(first_sector), file.filename)
    if header.l1_offset + header.table_length > file.size:
        raise ImageError(
            f"'{file.filename}': the L1 table at {header.l1_offset:#x} runs past the end of the file"
        )
    if header.features & headers.FEATURE_BACKING_FILE and header.backing_length:
        name = bytes(await file.read(header.backing_offset, header.backing_length))
        header = headers.with_backing(header, name)
    return header


async def load_l1(file: ProtocolNode, header: Header, start: int, end: int) -> "array[int]":
    """Read a range of the entries of the L1 table."""
    if start == end:
        return array("Q")
    data = await file.read(header.l1_offset + start * ENTRY_SIZE, (end - start) * ENTRY_SIZE)
    return unpack_entries(data)


def _packed_features(header: Header) -> bytes:
    return struct.pack("<Q", header.features)
