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

_BYTE_ORDER = 3  # from here on a refcount takes whole bytes
_TYPECODES = "BBBBHIQ"


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
