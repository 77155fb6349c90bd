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

import re
from array import array
from typing import Final

from blockd.block.node import ProtocolNode
from blockd.formats import entry_runs
from blockd.formats.entry_runs import (
    APART,
    CONTENT,
    IMPOSSIBLE,
    STORED,
    ZEROES,
    bit_table,
    flagged,
    labels,
    packed,
    united,
)
from blockd.formats.qcow2.corruption import Corruption
from blockd.formats.qcow2.header import SUBCLUSTER_COUNT
from blockd.formats.qcow2.lookup import MIXED, Lookup
from blockd.formats.qcow2.mapping import COMPRESSED, OFFSET_MASK, RESERVED_MASK, STATE_MASK, ZERO, L2Table
from blockd.formats.qcow2.metadata import Metadata
from blockd.units import align_down

ALL_SUBCLUSTERS: Final = (1 << SUBCLUSTER_COUNT) - 1

# How many clusters are looked at at once.
CLUSTER_COUNT_MAX: Final = 256

_PRESENT_TABLE: Final = bytes.maketrans(b"01", bytes([0, STORED]))
_ZERO_TABLE: Final = bytes.maketrans(b"01", bytes([0, ZEROES]))
_PART_LABELS: Final = bytes.maketrans(bytes([0, STORED, ZEROES, STORED | ZEROES]), b"-d0X")
_FIRST_FLAGS: Final = bytes.maketrans(b"-d0X", bytes([0, STORED, ZEROES, IMPOSSIBLE]))
_APART_TABLE: Final = bit_table(APART, APART)


def _cluster_label(flags: int) -> bytes:
    """Of a cluster whose bitmap does not count; the others have none."""
    if flags & entry_runs.COMPRESSED:
        return b"C"
    return b"X" if flags & IMPOSSIBLE or flags & (CONTENT | STORED) == CONTENT else b"-"


_CLUSTER_LABELS: Final = b"".join(map(_cluster_label, range(256)))
# What of an entry is told for a subcluster with a label.
_ENTRY_MASKS: Final = {
    **dict.fromkeys(b"-0", 0),
    **dict.fromkeys(b"dD", STATE_MASK & ~RESERVED_MASK & ~ZERO),
    **dict.fromkeys(b"cC", STATE_MASK),
}
_ZEROES: Final = ord("0")
_WHOLE: Final = re.compile(rb"[CX]")
_WHOLE_LABELS: Final = {
    b"C": b"C" + b"c" * (SUBCLUSTER_COUNT - 1),
    b"X": b"X" * SUBCLUSTER_COUNT,
}


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
        self._unit_bits = self._subclusters.size.bit_length() - 1
        self._entry_numbers = 2
        self._look_length = CLUSTER_COUNT_MAX * self._cluster_size
        self._alike_length = self._few

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

    def _few_runs(self, table: L2Table, offset: int, end: int) -> list[tuple[int, int, int]]:
        entry = self.entry_nowait(offset, end - offset)
        has_reserved = entry & RESERVED_MASK and not entry & COMPRESSED
        return [(offset, end - offset, entry)] if entry >= 0 and not has_reserved else []

    def _entries(self, table: L2Table, offset: int, found: bytes, units: list[int]) -> list[int]:
        index = self._index(offset)
        entries = table.entries[index : index + 2 * len(found) // SUBCLUSTER_COUNT : 2]
        told = zip(
            map(found.__getitem__, units), (entries[unit // SUBCLUSTER_COUNT] for unit in units), strict=True
        )
        return [entry & _ENTRY_MASKS[label] | (label == _ZEROES) for label, entry in told]

    def _entries_of(self, table: L2Table, offset: int, label_count: int) -> "array[int]":
        index = self._index(offset)
        return table.entries[index : index + 2 * label_count // SUBCLUSTER_COUNT : 2]

    def _contradiction(self, table: L2Table, offset: int) -> Corruption:
        index = self._index(offset)
        return contradiction(self._file, offset, *table.entries[index : index + 2])

    def _labels(self, table: L2Table, index: int, count: int, *, with_places: bool) -> bytes:
        """A label for each subcluster."""
        pairs = table.entries[2 * index : 2 * (index + count)]
        bitmaps = memoryview(packed(pairs[1::2])).cast("I")
        present, zero = bitmaps[0::2].tobytes(), bitmaps[1::2].tobytes()
        parts = _spread(present).translate(_PRESENT_TABLE), _spread(zero).translate(_ZERO_TABLE)
        found = bytearray(united(parts, count * SUBCLUSTER_COUNT).translate(_PART_LABELS))
        entry_flags = self._flags(packed(pairs[0::2]), count, with_places=with_places)
        content = flagged((present[byte::4] for byte in range(4)), count, CONTENT)
        flags = united((*entry_flags, content), count)
        if with_places:
            firsts = found[::SUBCLUSTER_COUNT].translate(_FIRST_FLAGS)
            found[::SUBCLUSTER_COUNT] = labels((firsts, flags.translate(_APART_TABLE)), count)
        for match in _WHOLE.finditer(flags.translate(_CLUSTER_LABELS)):
            start = match.start() * SUBCLUSTER_COUNT
            found[start : start + SUBCLUSTER_COUNT] = _WHOLE_LABELS[match[0]]
        return bytes(found)


def _spread(bits: bytes) -> bytes:
    """A "0" or "1" for each bit, least significant first."""
    digits = format(int.from_bytes(bits, "little"), f"0{8 * len(bits)}b")
    return digits[::-1].encode()
