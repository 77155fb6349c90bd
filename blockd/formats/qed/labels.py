"""The labels of map entries (see block/layers.py), of many at once."""

from array import array
from typing import Final

from blockd.formats.entry_runs import (
    APART,
    IMPOSSIBLE,
    STORED,
    ZEROES,
    apart,
    bit_table,
    columns,
    flagged,
    packed,
    united,
)
from blockd.formats.qed.mapping import ZERO

# The lowest byte of an entry: clusters begin at multiples of 4 KiB.
_LOW_TABLE: Final = bytes([0, ZEROES]) + bytes([IMPOSSIBLE]) * 254
_PLACE_MASK: Final = (1 << 64) - 1


def _label(flags: int) -> bytes:
    if flags & IMPOSSIBLE or (flags & ZEROES and flags & STORED):
        return b"X"
    if flags & STORED:
        return b"D" if flags & APART else b"d"
    return b"0" if flags & ZEROES else b"-"


_LABELS: Final = b"".join(map(_label, range(256)))


class EntryLabels:
    """How entries of images with such clusters are told."""

    def __init__(self, cluster_size: int, first_cluster: int) -> None:
        self._cluster_size = cluster_size
        self._first_cluster = first_cluster
        # What makes a place impossible, byte by byte from the second one on.
        odd = cluster_size - 1
        self._odd_tables = [
            bit_table(odd >> shift & 0xFF, IMPOSSIBLE) for shift in (8, 16, 24) if odd >> shift
        ]

    def of(self, entries: "array[int]", file_size: int, *, with_places: bool) -> bytes:
        """A label for each cluster, up to the first one that cannot be; so none is wrong."""
        count = len(entries)
        table = packed(entries)
        low, *high = columns(table)
        flags = [low.translate(_LOW_TABLE), flagged(high, count, STORED)]
        odd = (column.translate(odd) for column, odd in zip(high, self._odd_tables, strict=False))
        flags.append(flagged(odd, count, IMPOSSIBLE))
        if with_places:
            flags.append(apart(table, _PLACE_MASK, self._cluster_size))
        found = united(flags, count).translate(_LABELS)
        return found[: min(self._sound_count(found), self._inside_count(entries, file_size))]

    def _sound_count(self, labels: bytes) -> int:
        found = labels.find(b"X")
        return len(labels) if found < 0 else found

    def _inside_count(self, entries: "array[int]", file_size: int) -> int:
        """How many come before the first place that is not in the part of the file that data can be in."""
        first, last = self._first_cluster, file_size - self._cluster_size
        is_low_possible = first > self._cluster_size
        if max(entries) <= last and not (is_low_possible and any(ZERO < entry < first for entry in entries)):
            return len(entries)
        outside = (
            number for number, entry in enumerate(entries) if entry > ZERO and not first <= entry <= last
        )
        return next(outside, len(entries))
