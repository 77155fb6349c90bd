"""Guest clusters to host clusters: the L1 table, and pages of the L2 tables in bounded memory.

An L2 entry (u64, little endian on disk, native here):

    0       unallocated: the backing decides
    1       reads as zeroes
    else    host offset of the cluster, cluster aligned

A table may have up to a GiB, so it is read and kept in pages. Of a table that is new, pages that nobody
has changed are zeroes, in memory and in the file: it lies in space that was never used before.

Memory holds the newest mapping; the disk gets it by checkpoints (checkpoint.py), which ask for the
changes with `take_changes`. A changed page stays in memory until it has been written.

Source:   QED specification, "Tables".
"""

import sys
from array import array
from bisect import bisect_right, insort
from typing import Final, NamedTuple

from blockd.block.file_events import FileEvent
from blockd.block.node import ProtocolNode
from blockd.errors import ImageError
from blockd.formats.qed.header import Header
from blockd.formats.table_cache import TableCache
from blockd.units import KIB, MIB

UNALLOCATED: Final = 0
ZERO: Final = 1
ENTRY_SIZE: Final = 8

PAGE_LENGTH_MAX: Final = 64 * KIB
# With clusters of 64 KiB a page maps 512 MiB: 128 GiB of disk stay in memory.
CACHE_LENGTH_MAX: Final = 16 * MIB


class Page:
    """A part of an L2 table in memory, and which of its entries the disk does not have yet."""

    __slots__ = ("changed_from", "changed_to", "entries", "host_offset")

    def __init__(self, host_offset: int, entries: "array[int]") -> None:
        self.host_offset = host_offset
        self.entries = entries
        self.changed_from = len(entries)
        self.changed_to = 0


class TableWrite(NamedTuple):
    """Bytes of a table for the disk; `entries` are native, packing is left to the thread."""

    host_offset: int
    entries: "array[int]"


class MappingChanges(NamedTuple):
    """What a checkpoint has to write: new tables first, then old tables and the L1 entries."""

    new_tables: list[TableWrite]
    updates: list[TableWrite]
    l1_entries: list[TableWrite]
    taken: dict[int, tuple[int, int]]  # by page: the range of entries, to put back on failure
    linked: list[int]  # the new tables, by L1 index

    @property
    def is_empty(self) -> bool:
        return not (self.updates or self.l1_entries)


def pack_entries(entries: "array[int]") -> bytes:
    """Native table entries as little endian bytes."""
    if sys.byteorder == "little":
        return entries.tobytes()
    swapped = entries[:]
    swapped.byteswap()
    return swapped.tobytes()


def unpack_entries(data: bytes | bytearray | memoryview) -> "array[int]":
    """Little endian table bytes as native entries."""
    entries = array("Q")
    entries.frombytes(data)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


class Mapping:
    """The L1 table and a cache of pages of the L2 tables of one image."""

    def __init__(self, file: ProtocolNode, header: Header, l1: "array[int]") -> None:
        self._file = file
        self._header = header
        self.l1 = l1
        self._page_length = min(PAGE_LENGTH_MAX, header.table_length)
        self.cache: TableCache[Page] = TableCache(CACHE_LENGTH_MAX // self._page_length)
        self.pages = self.cache.tables
        self._changed = self.cache.changed
        # L1 indexes of tables that the L1 table on disk does not name yet.
        self._new: set[int] = set()
        # Where tables are, in order: no guest data is ever written there.
        self._tables = array("Q", sorted(entry for entry in l1 if entry))
        # How many guest offset bits one cluster, page, table covers.
        self.cluster_bits = header.cluster_size.bit_length() - 1
        self.page_bits = self.cluster_bits + (self._page_length // ENTRY_SIZE).bit_length() - 1
        self.table_bits = self.cluster_bits + header.entry_count.bit_length() - 1
        self.index_mask = self._page_length // ENTRY_SIZE - 1

    # -- looking up ---------------------------------------------------------------------------

    def page_nowait(self, number: int) -> Page | None:
        """The page if it is in memory, or in the page cache, or new."""
        if not self._place(number):
            return None
        return self.cache.load_nowait(number, lambda: self._read_nowait(number))

    def _read_nowait(self, number: int) -> Page | None:
        host_offset = self._place(number)
        if self._l1_index(number) in self._new:
            return Page(host_offset, array("Q", bytes(self._page_length)))
        data = self._file.read_nowait(host_offset, self._page_length)
        return None if data is None else Page(host_offset, unpack_entries(data))

    async def page(self, number: int) -> Page | None:
        """The page, read if need be; None when the L1 entry says that there is no table.

        Needs:    what is done with it is done before anything else is waited for: it may be evicted then.
        """
        if (page := self.page_nowait(number)) is not None or not self._place(number):
            return page
        return await self.cache.load(number, lambda: self._read(number))

    async def _read(self, number: int) -> Page:
        host_offset = self._place(number)
        self._file.announce(FileEvent.L2_LOAD)
        return Page(host_offset, unpack_entries(await self._file.read(host_offset, self._page_length)))

    def has_table(self, number: int) -> bool:
        """Whether there is a table with a page."""
        return bool(self.l1[self._l1_index(number)])

    def _l1_index(self, number: int) -> int:
        return number >> self.table_bits - self.page_bits

    def _place(self, number: int) -> int:
        """Where a page is in the file; 0: its table does not exist.

        Raises:   ImageError: the L1 entry points to what is no table inside the file.
        """
        l1_index = self._l1_index(number)
        table_offset = self.l1[l1_index]
        if not table_offset:
            return 0
        if l1_index not in self._new:
            self._check_table_offset(l1_index, table_offset)
        number_in_table = number & (1 << self.table_bits - self.page_bits) - 1
        return table_offset + number_in_table * self._page_length

    def _check_table_offset(self, l1_index: int, offset: int) -> None:
        header = self._header
        end = offset + header.table_length
        is_inside = header.first_cluster <= offset and end <= self._file.size
        is_apart = end <= header.l1_offset or header.l1_offset + header.table_length <= offset
        if offset % header.cluster_size or not is_inside or not is_apart:
            raise ImageError(
                f"'{self._file.filename}': L1 entry {l1_index} points to {offset:#x}, which is not a "
                "table inside the file"
            )

    def is_metadata(self, host_offset: int, length: int) -> bool:
        """Whether any part of a range of the file belongs to the header or to a table."""
        header, end = self._header, host_offset + length
        last = bisect_right(self._tables, end - 1) - 1
        return (
            host_offset < header.first_cluster
            or (header.l1_offset < end and host_offset < header.l1_offset + header.table_length)
            or (last >= 0 and host_offset < self._tables[last] + header.table_length)
        )

    # -- changing -----------------------------------------------------------------------------

    def add_table(self, number: int, host_offset: int) -> None:
        """Put a new, empty table for a page at clusters that were never used."""
        l1_index = self._l1_index(number)
        self.l1[l1_index] = host_offset
        self._new.add(l1_index)
        insort(self._tables, host_offset)

    def set_entries(self, number: int, page: Page, index: int, entries: list[int]) -> None:
        """Publish new entries, neighbours from `index` on.

        Needs:    `page` was looked up without waiting for anything since: it may be evicted otherwise.
        """
        end = index + len(entries)
        page.entries[index:end] = array("Q", entries)
        page.changed_from = min(page.changed_from, index)
        page.changed_to = max(page.changed_to, end)
        self._changed.add(number)

    def extend_l1(self, entries: "array[int]") -> None:
        """Use more of the L1 table, as the file has it."""
        self.l1.extend(entries)
        for entry in entries:
            if entry:
                insort(self._tables, entry)

    def take_changes(self) -> MappingChanges:
        """Hand out everything that the disk does not have, and count it as written."""
        changes = MappingChanges([], [], [], {}, sorted(self._new))
        for l1_index in changes.linked:
            # The file has to reach to the end of the table; what lies between reads as zeroes.
            end = self.l1[l1_index] + self._header.table_length
            changes.new_tables.append(TableWrite(end - ENTRY_SIZE, array("Q", [UNALLOCATED])))
            where = self._header.l1_offset + l1_index * ENTRY_SIZE
            changes.l1_entries.append(TableWrite(where, self.l1[l1_index : l1_index + 1]))
        for number in self.cache.take_changed():
            page = self.pages[number]
            start, end = page.changed_from, page.changed_to
            is_new = self._l1_index(number) in self._new
            write = TableWrite(page.host_offset + start * ENTRY_SIZE, page.entries[start:end])
            (changes.new_tables if is_new else changes.updates).append(write)
            changes.taken[number] = (start, end)
            page.changed_from, page.changed_to = len(page.entries), 0
        return changes

    def changes_written(self, changes: MappingChanges) -> None:
        """The disk has these changes now."""
        self._new.difference_update(changes.linked)
        self.cache.write_succeeded(changes.taken)

    def changes_failed(self, changes: MappingChanges) -> None:
        """The disk may or may not have these changes: they have to be written again."""
        for number, (start, end) in changes.taken.items():
            page = self.pages[number]
            page.changed_from = min(page.changed_from, start)
            page.changed_to = max(page.changed_to, end)
        self.cache.write_failed(changes.taken)
