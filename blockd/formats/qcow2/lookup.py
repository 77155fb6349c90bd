"""Looking a range of the guest's disk up in the map: what its clusters are, and where.

What is told of neighbouring clusters that are alike is the map entry of the first one.
"""

from array import array
from collections.abc import Iterator
from typing import Final

from blockd.formats.qcow2.corruption import Corruption
from blockd.formats.qcow2.mapping import COMPRESSED, OFFSET_MASK, RESERVED_MASK, STATE_MASK, ZERO, L2Table
from blockd.formats.qcow2.metadata import Metadata
from blockd.units import align_down

# A range of clusters that differ in where they are, or one that would have to be looked up on disk.
MIXED: Final = -1

# How many clusters are looked up before others get their turn.
RUN_CLUSTER_COUNT_MAX: Final = 512


# Looked at together: 64 TiB of nothing are 131,072 entries, and are walked over again and again.
_NOTHING: Final = array("Q", bytes(4096))


class Lookup:
    """The map of an image whose clusters are allocated whole."""

    def __init__(self, metadata: Metadata) -> None:
        header = metadata.header
        self._file = metadata.file
        self._mapping = metadata.mapping
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._cluster_mask = header.cluster_size - 1
        self._odd_mask = RESERVED_MASK | (OFFSET_MASK & self._cluster_mask)
        self._table_bits = metadata.mapping.table_bits
        self._index_mask = metadata.mapping.index_mask

    def entry_nowait(self, offset: int, length: int, mask: int = STATE_MASK) -> int:
        """The masked map entry of a range whose clusters are alike, and neighbours where they have a place.

        Returns a negative number for any other range, and when a table has to be read first.
        """
        l1_index = offset >> self._table_bits
        last = offset + length - 1
        if last >> self._table_bits != l1_index:
            return MIXED
        table = self._mapping.tables.get(l1_index) or self._mapping.table_nowait(l1_index)
        if table is None:
            return MIXED if self._mapping.l1[l1_index] else 0
        index = (offset >> self._cluster_bits) & self._index_mask
        count = (last >> self._cluster_bits) - (offset >> self._cluster_bits)
        entry = first = table.entries[index] & mask
        if count:
            step = self._cluster_size if entry & OFFSET_MASK else 0
            for following in table.entries[index + 1 : index + 1 + count]:
                entry += step
                if following & mask != entry:
                    return MIXED
        if first & self._odd_mask and not first & COMPRESSED:
            return MIXED  # `runs` says what it means, or what is wrong with it
        return first

    async def runs(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Look a range up, reading tables as needed: (offset, length, entry) of clusters that are alike.

        May stop before the end of the range: after one table, a stretch without tables, or many clusters.
        """
        l1_index = offset >> self._table_bits
        table = await self._mapping.table(l1_index)
        if table is None:
            return [(offset, self._unmapped_length(l1_index, offset, length), 0)]
        end = min(offset + length, (l1_index + 1) << self._table_bits)
        stop = align_down(offset, self._cluster_size) + RUN_CLUSTER_COUNT_MAX * self._cluster_size
        empty_end = self._empty_end(table, offset, end) if stop < end else offset
        if empty_end >= stop:
            return [(offset, empty_end - offset, 0)]
        return list(self._table_runs(table, offset, min(end, stop)))

    def _empty_end(self, table: L2Table, offset: int, end: int) -> int:
        """Where a stretch of unallocated clusters ends that begins at `offset`."""
        index = (offset >> self._cluster_bits) & self._index_mask
        count = ((end - 1) >> self._cluster_bits) - (offset >> self._cluster_bits) + 1
        empty_count = _first_set(table.entries, index, index + count) - index
        return min(end, align_down(offset, self._cluster_size) + empty_count * self._cluster_size)

    def _table_runs(self, table: L2Table, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        entry = self._entry_of_all(table, offset, end)
        if entry is not None:
            yield offset, end - offset, entry
            return
        start, first, distance = offset, None, 0
        for cluster_offset in range(align_down(offset, self._cluster_size), end, self._cluster_size):
            entry = table.entries[(cluster_offset >> self._cluster_bits) & self._index_mask] & STATE_MASK
            if entry & self._odd_mask and not entry & COMPRESSED:
                entry = self._meaning(cluster_offset, entry)
            if first is None or not continues(first, distance, entry):
                if first is not None:
                    yield start, cluster_offset - start, first
                start, first, distance = max(offset, cluster_offset), entry, 0
            distance += self._cluster_size
        if first is not None:
            yield start, end - start, first

    def _entry_of_all(self, table: L2Table, offset: int, end: int) -> int | None:
        """The first entry of a range if all of it is one run, found out without looking at each cluster.

        None: it may be one nevertheless.
        """
        index = (offset >> self._cluster_bits) & self._index_mask
        count = ((end - 1) >> self._cluster_bits) - (offset >> self._cluster_bits) + 1
        entries = table.entries[index : index + count]
        first = entries[0]
        if not first:
            return 0 if entries == _NOTHING[:count] else None
        if first & (COMPRESSED | ZERO | self._odd_mask):
            return None
        neighbours = range(first, first + count * self._cluster_size, self._cluster_size)
        return first & STATE_MASK if entries == array("Q", neighbours) else None

    def _unmapped_length(self, l1_index: int, offset: int, length: int) -> int:
        end = offset + length
        next_index = _first_set(self._mapping.l1, l1_index + 1, ((end - 1) >> self._table_bits) + 1)
        return min(next_index << self._table_bits, end) - offset

    def _meaning(self, offset: int, entry: int) -> int:
        """The entry without reserved bits."""
        if entry & OFFSET_MASK & self._cluster_mask:
            raise Corruption(
                self._file,
                f"the cluster of guest offset {offset:#x} "
                f"has the unaligned host offset {entry & OFFSET_MASK:#x}",
            )
        return entry & ~RESERVED_MASK


def continues(first: int, distance: int, entry: int) -> bool:
    """Whether the cluster of `entry` goes on where a run that began `distance` bytes before ends."""
    if (first | entry) & COMPRESSED:
        return False
    if (first | entry) & ZERO:
        return bool(first & entry & ZERO)
    if not first or not entry:
        return first == entry
    return entry == first + distance


def _first_set(entries: "array[int]", start: int, end: int) -> int:
    """Where the first entry that is not 0 stands, from `start` on; `end` if there is none."""
    step = len(_NOTHING)
    while start + step <= end and entries[start : start + step] == _NOTHING:
        start += step
    while start < end and not entries[start]:
        start += 1
    return start
