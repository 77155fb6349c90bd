"""Tables as most are, looked at as a whole: all that they name is clusters of data, or compressed ones.

No step in Python is made for an entry: see `blockd.formats.entry_runs`.
"""

import re
from array import array
from itertools import compress
from operator import sub
from typing import Final

from blockd.formats.entry_runs import (
    APART,
    ENTRY_SIZE,
    apart,
    bit_table,
    columns,
    is_one_run,
    packed,
    united,
)

_OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
_COPIED: Final = 1 << 63
_ZERO: Final = 1

_NAMED: Final = bytes([0]) + bytes([1]) * 255
_APART: Final = re.compile(re.escape(bytes([APART])))
_COMPRESSED_TABLE: Final = bit_table(1 << 62 - 56, 1)


class PlainTables:
    """The tables of an image whose clusters have 1 << `cluster_bits` bytes."""

    def __init__(self, cluster_bits: int) -> None:
        self._bits = cluster_bits
        self._place_mask = _OFFSET_MASK & -(1 << cluster_bits)
        mask = (self._place_mask | _COPIED | _ZERO).to_bytes(8, "little")
        # What each byte of an entry may be.
        self._allowed = [bytes(byte for byte in range(256) if not byte & ~part) for part in mask]

    def runs(self, entries: "array[int]", *, are_copied: bool) -> list[tuple[int, int]] | None:
        """What a table names: the first of neighbouring clusters, and how many they are.

        `are_copied`: the copied flag is set for each. None: something else is in the table.
        """
        first, last, flags = entries[0], entries[-1], _COPIED if are_copied else 0
        is_plain = first & ~self._place_mask == last & ~self._place_mask == flags != first
        if is_plain and is_one_run(entries, 1 << self._bits):  # so it is in images that were streamed into
            return [((first & _OFFSET_MASK) >> self._bits, len(entries))]
        return self._all_runs(entries, are_copied=are_copied)

    def _all_runs(self, entries: "array[int]", *, are_copied: bool) -> list[tuple[int, int]] | None:
        count, table = len(entries), packed(entries)
        parts = columns(table)
        if any(part.translate(None, allowed) for part, allowed in zip(parts, self._allowed, strict=True)):
            return None
        zeroes, *places, highest = parts
        named = united([*places, highest], count).translate(_NAMED)
        if int.from_bytes(named, "little") & int.from_bytes(zeroes, "little"):
            return None  # a cluster of its own, and zeroes all the same
        if are_copied and highest.translate(_NAMED) != named:
            return None
        used = array("Q", compress(entries, named))
        if not used:
            return []
        # Neighbours in the file are a run whatever is between them in the table: so it is in new images.
        flags = apart(packed(used), _OFFSET_MASK, 1 << self._bits)
        starts = [match.start() for match in _APART.finditer(flags)]
        firsts = [(used[start] & _OFFSET_MASK) >> self._bits for start in starts]
        return list(zip(firsts, map(sub, [*starts[1:], len(used)], starts), strict=True))

    def without_compressed(self, entries: "array[int]") -> tuple["array[int]", list[int]]:
        """A table without its entries of compressed clusters, and these."""
        marks = packed(entries)[ENTRY_SIZE - 1 :: ENTRY_SIZE].translate(_COMPRESSED_TABLE)
        if 1 not in marks:
            return entries, []
        plain = array("Q", [0 if mark else entry for entry, mark in zip(entries, marks, strict=True)])
        return plain, list(compress(entries, marks))
