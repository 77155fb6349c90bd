"""Guest clusters to host clusters: the L1 table, and the L2 tables in bounded memory.

An L2 entry (u64, big endian on disk, native here):

    bit 0       reads as zeroes, whatever the host offset says; version 2 does not know it
    bits 9-55   host offset of the cluster; 0: unallocated, the backing decides
    bit 62      compressed: the rest is a descriptor of its own
    bit 63      COPIED: the refcount is exactly one, so the cluster may be written in place

An extended L2 entry has the bitmap of its subclusters (subcluster_lookup.py) behind it, as an item of
`L2Table.entries` of its own.

A table that a snapshot shares (the L1 entry is not COPIED) is never written: a copy takes its place.

Memory holds the newest mapping; the disk gets it by checkpoints (checkpoint.py), which ask for the
changes with `take_changes`. A changed table stays in memory until it has been written.

Source: qcow2 specification, "Cluster mapping".
"""

import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from blockd.block.file_events import FileEvent
from blockd.block.node import ProtocolNode
from blockd.formats.qcow2.corruption import Corruption
from blockd.formats.qcow2.header import ZERO_VERSION, Header
from blockd.formats.table_cache import TableCache
from blockd.units import MIB, SECTOR_SIZE

ZERO: Final = 1 << 0
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
# Without a meaning where the cluster is not compressed; QEMU ignores them.
RESERVED_MASK: Final = 0x3F00_0000_0000_01FE
COMPRESSED: Final = 1 << 62
COPIED: Final = 1 << 63
# What decides about a cluster's content: all but how many users it has.
STATE_MASK: Final = COPIED - 1

# Tables of 64 KiB clusters map 512 MiB each: 128 GiB of disk stay in memory.
L2_CACHE_SIZE_MAX: Final = 16 * MIB
L2_CACHE_COUNT_MIN: Final = 8


def compressed_extent(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Host offset and stored length of a compressed cluster; the last sector may be used in part."""
    sector_shift = 62 - (cluster_bits - 8)
    offset = entry & ((1 << sector_shift) - 1)
    sector_count = ((entry & (COMPRESSED - 1)) >> sector_shift) + 1
    return offset, sector_count * SECTOR_SIZE - offset % SECTOR_SIZE


class L2Table:
    """One L2 table in memory, and which of its entries the disk does not have yet."""

    __slots__ = ("changed_from", "changed_to", "entries", "host_offset", "is_linked", "linked_before")

    def __init__(
        self, host_offset: int, entries: "array[int]", *, is_linked: bool, linked_before: int = 0
    ) -> None:
        self.host_offset = host_offset
        self.entries = entries
        # Whether the L1 entry on disk points here; until then the table is not reachable.
        self.is_linked = is_linked
        # The L1 entry that the disk has until then.
        self.linked_before = linked_before
        self.changed_from = len(entries)
        self.changed_to = 0


def pack_entries(entries: "array[int]") -> bytes:
    """Native table entries as big endian bytes."""
    if sys.byteorder == "big":
        return entries.tobytes()
    swapped = entries[:]
    swapped.byteswap()
    return swapped.tobytes()


class TableWrite(NamedTuple):
    """A part of a table for the disk; making bytes of it is left to the thread that writes it."""

    host_offset: int
    entries: "array[int]"
    pack: Callable[["array[int]"], bytes] = pack_entries


def unpack_entries(data: bytes | bytearray | memoryview, typecode: str = "Q") -> "array[int]":
    """Big endian table bytes as native entries."""
    entries = array(typecode)
    entries.frombytes(data)
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


class MappingChanges(NamedTuple):
    """What a checkpoint has to write: new tables first, then old tables and the L1 entries."""

    new_tables: list[TableWrite]
    updates: list[TableWrite]
    l1_entries: list[TableWrite]
    taken: dict[int, tuple[int, int]]  # by L1 index: the range of entries, to put back on failure


class Mapping:
    """The L1 table and a cache of L2 tables of one image."""

    def __init__(self, file: ProtocolNode, header: Header, l1: "array[int]", reserved: set[int]) -> None:
        self._file = file
        self._reserved = reserved
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self._knows_zero = header.version >= ZERO_VERSION
        self.l1_offset = header.l1_offset
        self.l1 = l1
        self.cache: TableCache[L2Table] = TableCache(
            max(L2_CACHE_COUNT_MIN, L2_CACHE_SIZE_MAX >> header.cluster_bits)
        )
        self.tables = self.cache.tables
        self._changed = self.cache.changed
        # How many guest offset bits one L2 table covers.
        index_bits = (header.cluster_size // header.l2_entry_size).bit_length() - 1
        self.table_bits = header.cluster_bits + index_bits
        self.index_mask = (1 << index_bits) - 1

    # -- looking up ---------------------------------------------------------------------------

    def table_nowait(self, l1_index: int) -> L2Table | None:
        """The table if it is in memory, or sound and its pages are in the page cache."""
        if not self.l1[l1_index] & OFFSET_MASK:
            return None
        return self.cache.load_nowait(l1_index, lambda: self._read_nowait(l1_index))

    def _read_nowait(self, l1_index: int) -> L2Table | None:
        host_offset = self.l1[l1_index] & OFFSET_MASK
        if not self._is_place_of_table(host_offset):
            return None
        data = self._file.read_nowait(host_offset, self.cluster_size)
        if data is None or not self._is_table(entries := unpack_entries(data)):
            return None
        return L2Table(host_offset, entries, is_linked=True)

    async def table(self, l1_index: int) -> L2Table | None:
        """The table, read if need be; None when the L1 entry says that there is none.

        Needs:    what is done with it is done before anything else is waited for: it may be evicted then.
        Raises:   Corruption: the L1 entry or the table is wrong.
        """
        if (table := self.table_nowait(l1_index)) is not None or not self.l1[l1_index] & OFFSET_MASK:
            return table
        return await self.cache.load(l1_index, lambda: self._read(l1_index))

    async def _read(self, l1_index: int) -> L2Table:
        host_offset = self.l1[l1_index] & OFFSET_MASK
        if not self._is_place_of_table(host_offset):
            raise Corruption(
                self._file,
                f"L1 entry {l1_index} points to {host_offset:#x}, which is not a table inside the file",
            )
        self._file.announce(FileEvent.L2_LOAD)
        entries = unpack_entries(await self._file.read(host_offset, self.cluster_size))
        if not self._is_table(entries):
            raise Corruption(
                self._file,
                f"the L2 table at {host_offset:#x} has zero clusters, which version 2 cannot have",
            )
        return L2Table(host_offset, entries, is_linked=True)

    def _is_place_of_table(self, host_offset: int) -> bool:
        return not host_offset % self.cluster_size and host_offset + self.cluster_size <= self._file.size

    def _is_table(self, entries: "array[int]") -> bool:
        """Whether all entries are of kinds that the image's version knows."""
        return self._knows_zero or not any(entry & (ZERO | COMPRESSED) == ZERO for entry in entries)

    # -- changing -----------------------------------------------------------------------------

    def add_table(self, l1_index: int, host_offset: int) -> L2Table:
        """Put a new table at a cluster that was allocated for it: empty, or a copy of the one it replaces.

        Needs:    the table to replace is in memory.
        """
        before = self.l1[l1_index]
        entries = (
            self.tables[l1_index].entries if before & OFFSET_MASK else array("Q", bytes(self.cluster_size))
        )
        self.l1[l1_index] = host_offset | COPIED
        self._reserved.add(host_offset)
        table = L2Table(host_offset, entries, is_linked=False, linked_before=before)
        table.changed_from, table.changed_to = 0, len(entries)
        self.cache.put(l1_index, table)
        return table

    def set_entries(self, l1_index: int, table: L2Table, index: int, entries: Sequence[int]) -> None:
        """Publish new entries, neighbours from `index` on.

        Needs:    `table` was looked up without waiting for anything since: it may be evicted otherwise.
        """
        end = index + len(entries)
        table.entries[index:end] = array("Q", entries)
        table.changed_from = min(table.changed_from, index)
        table.changed_to = max(table.changed_to, end)
        self._changed.add(l1_index)

    def set_entry(self, l1_index: int, table: L2Table, index: int, entry: int) -> None:
        """Publish one new entry; as `set_entries`, which costs several times as much."""
        table.entries[index] = entry
        table.changed_from = min(table.changed_from, index)
        table.changed_to = max(table.changed_to, index + 1)
        self._changed.add(l1_index)

    def take_changes(self) -> MappingChanges:
        """Hand out everything that the disk does not have, and count it as written."""
        changes = MappingChanges([], [], [], {})
        for l1_index in self.cache.take_changed():
            table = self.tables[l1_index]
            start, end = table.changed_from, table.changed_to
            write = TableWrite(table.host_offset + start * 8, table.entries[start:end])
            if table.is_linked:
                changes.updates.append(write)
            else:
                changes.new_tables.append(write)
                changes.l1_entries.append(
                    TableWrite(self.l1_offset + l1_index * 8, self.l1[l1_index : l1_index + 1])
                )
            changes.taken[l1_index] = (start, end)
            table.changed_from, table.changed_to = len(table.entries), 0
        return changes

    def linked_l1(self) -> "array[int]":
        """A copy of the L1 table as the disk has it: without tables that are not written yet."""
        l1 = self.l1[:]
        for l1_index in self.cache.changed | self.cache.written:
            if not (table := self.tables[l1_index]).is_linked:
                l1[l1_index] = table.linked_before
        return l1

    def changes_written(self, changes: MappingChanges) -> None:
        """The disk has these changes now."""
        for l1_index in changes.taken:
            self.tables[l1_index].is_linked = True
        self.cache.write_succeeded(changes.taken)

    def changes_failed(self, changes: MappingChanges) -> None:
        """The disk may or may not have these changes: they have to be written again."""
        for l1_index, (start, end) in changes.taken.items():
            table = self.tables[l1_index]
            table.changed_from = min(table.changed_from, start)
            table.changed_to = max(table.changed_to, end)
        self.cache.write_failed(changes.taken)
