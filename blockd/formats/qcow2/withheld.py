"""Clusters that nothing names any more and that may not be used yet: reads under way may have planned to.

On disk their refcount is 0. In memory it is 1, so that the search for free clusters passes over them without
a look at anything else; here are the flags that tell the two apart. Blocks are merged with their flags as
large integers: no step in Python is made for a cluster.
"""

import sys
from array import array
from collections.abc import Callable
from operator import or_, xor

Pack = Callable[["array[int]"], bytes]


class Withheld:
    """By refcount block of `block_span` clusters: which of them are withheld."""

    def __init__(self, block_span: int) -> None:
        self._block_span = block_span
        self._flags: dict[int, bytearray] = {}

    def add(self, block_index: int, start: int, end: int) -> None:
        """Withhold some clusters of a block, which have a refcount of 1 in memory."""
        flags = self._flags.setdefault(block_index, bytearray(self._block_span))
        flags[start:end] = b"\1" * (end - start)

    def remove(self, block_index: int, start: int, end: int) -> None:
        """Withhold them no longer."""
        flags = self._flags[block_index]
        flags[start:end] = bytes(end - start)
        if 1 not in flags:
            del self._flags[block_index]

    def find(self, block_index: int, start: int, end: int) -> int:
        """The first of some clusters of a block that is withheld; `end`: none is."""
        flags = self._flags.get(block_index)
        found = -1 if flags is None else flags.find(1, start, end)
        return end if found < 0 else found

    def in_memory(self, block_index: int, entries: "array[int]") -> "array[int]":
        """What memory is to hold of a block that was read from the disk."""
        flags = self._flags.get(block_index)
        return entries if flags is None else _merged(entries, flags, or_)

    def pack(self, block_index: int, pack: Pack) -> Pack:
        """What makes of a block in memory what the disk is to hold; in a thread: a block may have 2 MiB."""
        flags = self._flags.get(block_index)
        if flags is None:
            return pack
        flags = flags[:]
        return lambda entries: pack(_merged(entries, flags, xor))


def _merged(entries: "array[int]", flags: bytearray, merge: Callable[[int, int], int]) -> "array[int]":
    ones = bytearray(len(entries) * entries.itemsize)
    ones[0 if sys.byteorder == "little" else entries.itemsize - 1 :: entries.itemsize] = flags
    merged = merge(int.from_bytes(entries.tobytes(), "little"), int.from_bytes(ones, "little"))
    return array(entries.typecode, merged.to_bytes(len(ones), "little"))
