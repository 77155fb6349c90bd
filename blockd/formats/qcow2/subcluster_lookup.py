"""Extended L2 entries: clusters that are allocated in 32 parts, the subclusters.

Behind the entry of each cluster is a bitmap (u64, big endian on disk, native here) of its subclusters:

    bits 0-31    the content of subcluster 0-31 is in the cluster that the entry names
    bits 32-63   subcluster 0-31 reads as zeroes; never together with the bit before
    neither      the backing decides, whether the entry names a cluster or not

A compressed cluster has no bitmap. The zero flag of ordinary entries is not used.

What is told of a range is the same as for whole clusters (lookup.py): the entry of the cluster where its
subclusters are present, ZERO where they are zeroes, 0 where they are nothing.

Source: qcow2 specification, "Extended L2 Entries".
"""

from collections.abc import Iterator
from typing import Final

from blockd.block.node import ProtocolNode
from blockd.formats.qcow2.corruption import Corruption
from blockd.formats.qcow2.header import SUBCLUSTER_COUNT
from blockd.formats.qcow2.lookup import MIXED, Lookup, continues
from blockd.formats.qcow2.mapping import COMPRESSED, OFFSET_MASK, STATE_MASK, ZERO, L2Table
from blockd.formats.qcow2.metadata import Metadata
from blockd.units import align_down

ALL_SUBCLUSTERS: Final = (1 << SUBCLUSTER_COUNT) - 1


class Subclusters:
    """Which bits of its cluster's bitmap a range of the guest's disk has."""

    def __init__(self, cluster_size: int) -> None:
        self.size = cluster_size // SUBCLUSTER_COUNT
        self._shift = self.size.bit_length() - 1

    def bits(self, offset: int, end: int) -> int:
        """A bit for each subcluster that a range inside one cluster touches."""
        first = (offset >> self._shift) % SUBCLUSTER_COUNT
        last = (end - 1 >> self._shift) % SUBCLUSTER_COUNT
        return (2 << last) - (1 << first)


def alike(entry: int, bitmap: int, bits: int) -> int:
    """The entry that stands for some subclusters of a cluster; MIXED if they differ or cannot be."""
    if entry & COMPRESSED:
        return entry
    present, zero = bitmap & bits, bitmap >> SUBCLUSTER_COUNT & bits
    if present == bits and not zero and entry & OFFSET_MASK:
        return entry & ~ZERO
    if zero == bits and not present:
        return ZERO
    return MIXED if present or zero else 0


def is_sound(entry: int, bitmap: int, cluster_size: int) -> bool:
    """Whether an entry and the bitmap behind it can be together."""
    if entry & COMPRESSED:
        return True
    present, zero = bitmap & ALL_SUBCLUSTERS, bitmap >> SUBCLUSTER_COUNT
    has_place = bool(entry & OFFSET_MASK)
    return not present & zero and has_place >= bool(present) and not entry & OFFSET_MASK & cluster_size - 1


def contradiction(file: ProtocolNode, offset: int, entry: int, bitmap: int) -> Corruption:
    """What to raise when they cannot."""
    return Corruption(
        file,
        f"the entry {entry:#x} and the bitmap {bitmap:#x} for guest offset {offset:#x} cannot be: "
        "its place is not aligned, or subclusters are in no place, or zero as well",
    )


class SubclusterLookup(Lookup):
    """The map of an image with extended L2 entries."""

    def __init__(self, metadata: Metadata) -> None:
        super().__init__(metadata)
        self._subclusters = Subclusters(self._cluster_size)

    def entry_nowait(self, offset: int, length: int, mask: int = STATE_MASK) -> int:
        l1_index, end = offset >> self._table_bits, offset + length
        if end - 1 >> self._table_bits != l1_index:
            return MIXED
        table = self._mapping.tables.get(l1_index) or self._mapping.table_nowait(l1_index)
        if table is None:
            return MIXED if self._mapping.l1[l1_index] else 0
        cluster_end = align_down(offset, self._cluster_size) + self._cluster_size
        first = self._entry(table, offset, min(end, cluster_end))
        expected = first = first & mask if first >= 0 else MIXED
        step = self._cluster_size if first & OFFSET_MASK else 0
        while cluster_end < end and expected >= 0:
            expected += step
            entry = self._entry(table, cluster_end, min(end, cluster_end + self._cluster_size))
            if entry < 0 or entry & mask != expected:
                return MIXED
            cluster_end += self._cluster_size
        return first

    def _index(self, offset: int) -> int:
        return 2 * (offset >> self._cluster_bits & self._index_mask)

    def _entry(self, table: L2Table, offset: int, end: int) -> int:
        """What stands for the part of one cluster from `offset` to `end`."""
        index = self._index(offset)
        entry, bitmap = table.entries[index], table.entries[index + 1]
        found = alike(entry, bitmap, self._subclusters.bits(offset, end))
        if found > 0 and found & OFFSET_MASK & self._cluster_mask and not found & COMPRESSED:
            return MIXED
        return found

    def _table_runs(self, table: L2Table, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        start, first = offset, None
        for position, entry in self._parts(table, offset, end):
            distance = align_down(position, self._cluster_size) - align_down(start, self._cluster_size)
            if first is None or not continues(first, distance, entry):
                if first is not None:
                    yield start, position - start, first
                start, first = position, entry
        if first is not None:
            yield start, end - start, first

    def _parts(self, table: L2Table, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Offset and entry of clusters whose subclusters are alike, and of the single ones of others."""
        while offset < end:
            cluster_end = min(end, align_down(offset, self._cluster_size) + self._cluster_size)
            entry = self._entry(table, offset, cluster_end)
            if entry >= 0:
                yield offset, entry & STATE_MASK
                offset = cluster_end
            while offset < cluster_end:
                entry = self._entry(table, offset, offset + 1)
                if entry < 0:
                    index = self._index(offset)
                    raise contradiction(self._file, offset, *table.entries[index : index + 2])
                yield offset, entry & STATE_MASK
                offset = min(cluster_end, align_down(offset, self._subclusters.size) + self._subclusters.size)
