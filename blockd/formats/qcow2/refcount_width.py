"""Refcounts of 1 to 64 bits: how a refcount block is kept in memory, and what it looks like on disk.

In memory a block is an array with an item a cluster, so that looking for a free one is a search for 0.
On disk refcounts of 8 bits and more are big endian; narrower ones share a byte, the lowest bits first.

    refcount_order    0  1  2   3   4   5   6
    bits              1  2  4   8  16  32  64
    item in memory    B  B  B   B   H   I   Q

Source: qcow2 specification, "Host cluster management".
"""

from array import array

from blockd.formats.qcow2.mapping import pack_entries, unpack_entries
from blockd.units import align_up

_BYTE_ORDER = 3  # from here on a refcount takes whole bytes
_TYPECODES = "BBBBHIQ"
# How many entries are compared at once: a table may have 2 MiB, nearly all of them 0.
_LOOKED_AT_ONCE = 4096


class RefcountWidth:
    """The width of an image's refcounts."""

    def __init__(self, order: int) -> None:
        self.bits = 1 << order
        self._typecode = _TYPECODES[order]
        self._is_narrow = order < _BYTE_ORDER

    def repeated(self, refcount: int, count: int) -> "array[int]":
        """The same refcount for many clusters."""
        return array(self._typecode, [refcount]) * count

    def unpack(self, data: bytes | bytearray | memoryview) -> "array[int]":
        """A block as stored, as an array."""
        if not self._is_narrow:
            return unpack_entries(data, self._typecode)
        # All clusters that have the same place in their byte at once, by arithmetic on one large number.
        length, per_byte = len(data), 8 // self.bits
        packed = int.from_bytes(data, "little")
        mask = int.from_bytes(bytes([(1 << self.bits) - 1]) * length, "little")
        refcounts = bytearray(length * per_byte)
        for place in range(per_byte):
            refcounts[place::per_byte] = (packed >> place * self.bits & mask).to_bytes(length, "little")
        return array("B", bytes(refcounts))

    def pack(self, refcounts: "array[int]") -> bytes:
        """A block for the disk."""
        if not self._is_narrow:
            return pack_entries(refcounts)
        per_byte = 8 // self.bits
        packed = 0
        for place in range(per_byte):
            packed |= int.from_bytes(refcounts[place::per_byte].tobytes(), "little") << place * self.bits
        return packed.to_bytes(len(refcounts) // per_byte, "little")


def find_zeroes(entries: "array[int]", start: int, step: int) -> int | None:
    """The first multiple of `step` from `start` on at which as many entries are 0."""
    start = align_up(start, step)
    if start + step <= len(entries) and not any(entries[start : start + step]):
        return start  # nearly always
    size = step * entries.itemsize
    data, zero = entries.tobytes(), bytes(size)
    position = start * entries.itemsize
    while (position := data.find(zero, position)) >= 0:
        position = align_up(position, size)
        if data.startswith(zero, position):
            return position // entries.itemsize
    return None


def used_count(entries: "array[int]") -> int:
    """Up to where there are entries that are not 0."""
    for start in reversed(range(0, len(entries), _LOOKED_AT_ONCE)):
        part = entries[start : start + _LOOKED_AT_ONCE]
        if part != array(part.typecode, [0]) * len(part):
            return start + -(-len(part.tobytes().rstrip(b"\0")) // part.itemsize)
    return 0
