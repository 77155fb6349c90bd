"""Looking a range of the guest's disk up in the map: what its clusters are, and where.

What is told of neighbouring clusters that are alike is the map entry of the first one.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import sub
from typing import Final

from blockd.block.node import Labelled
from blockd.extents import Extent, Kind, Range
from blockd.formats import entry_runs
from blockd.formats.entry_runs import (
    ENTRY_COUNT_MAX,
    IMPOSSIBLE,
    KIND_RUNS,
    KINDS,
    NOTHING_RUNS,
    PLACED_RUNS,
    RUN_COUNT_MAX,
    STORED,
    ZEROES,
    apart,
    bit_table,
    columns,
    flagged,
    follow,
    is_one_run,
    labels,
    packed,
)
from blockd.formats.qcow2.corruption import Corruption
from blockd.formats.qcow2.mapping import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    RESERVED_MASK,
    STATE_MASK,
    ZERO,
    L2Table,
)
from blockd.formats.qcow2.metadata import Metadata
from blockd.units import align_down

# A range of clusters that differ in where they are, or one that would have to be looked up on disk.
MIXED: Final = -1

_IMPOSSIBLE: Final = b"X"
# What is told of an entry by its label.
_TOLD_MASKS: Final = (
    dict.fromkeys(b"-0", 0) | dict.fromkeys(b"Dd", OFFSET_MASK) | dict.fromkeys(b"Cc", STATE_MASK)
)
_NOT_PLAIN: Final = re.compile(rb"[^-Dd]")
_TOLD_ZEROES: Final = dict.fromkeys(b"-DdCc", 0) | {ord("0"): ZERO}
_ENTRY_MASK: Final = STATE_MASK & ~RESERVED_MASK
_ZERO_TABLE: Final = bit_table(ZERO, ZEROES)
_SECOND_TABLE: Final = bit_table(OFFSET_MASK >> 8 & 0xFF, STORED)
_COMPRESSED_TABLE: Final = bit_table(COMPRESSED >> 56, entry_runs.COMPRESSED)

# So few clusters are looked at one by one; of more it is asked at once whether they are all alike.
FEW_CLUSTERS: Final = 16

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
        # How many numbers of a table an entry is.
        self._entry_numbers = 1
        # What has a label of its own.
        self._unit_bits = self._cluster_bits
        # How much is looked at at once, up to which length it is faster to look at each cluster, and up to
        # which one to find out first whether all are alike.
        self._look_length = ENTRY_COUNT_MAX * self._cluster_size
        self._few = FEW_CLUSTERS * self._cluster_size
        self._alike_length = self._look_length
        # What makes a host offset impossible, byte by byte from the second one on.
        odd = OFFSET_MASK & self._cluster_mask
        self._odd_tables = [bit_table(odd >> shift & 0xFF, IMPOSSIBLE) for shift in (8, 16) if odd >> shift]

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
            others = table.entries[index + 1 : index + 1 + count]
            if count >= FEW_CLUSTERS:
                return first if follow(others, table.entries[index], step) and self._can_be(first) else MIXED
            for following in others:
                entry += step
                if following & mask != entry:
                    return MIXED
        return first if self._can_be(first) else MIXED

    def _can_be(self, entry: int) -> bool:
        """Whether an entry is plain; of others `runs` says what they mean, or what is wrong with them."""
        return bool(entry & COMPRESSED) or not entry & self._odd_mask

    async def runs(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Look a range up, reading tables as needed: (offset, length, entry) of clusters that are alike.

        May stop before the end of the range: after one table, a stretch without tables, many clusters or
        many runs.
        """
        table, end = await self._stretch(offset, length)
        if table is None:
            return [(offset, end - offset, 0)]
        if end - offset <= self._few and (runs := self._few_runs(table, offset, end)):
            return runs
        found, units, offsets = self._labelled(table, offset, end, PLACED_RUNS)
        entries = self._entries(table, offset, found, units)
        return list(zip(offsets, map(sub, offsets[1:], offsets), entries, strict=False))

    async def map(self, offset: int, length: int) -> list[Extent]:
        """What kinds of clusters a range has; may stop before its end, as `runs`."""
        table, end = await self._stretch(offset, length)
        if table is None:
            return [Extent(offset, end - offset, Kind.UNALLOCATED)]
        if end - offset <= self._alike_length and (entry := self.entry_nowait(offset, end - offset)) >= 0:
            return [Extent(offset, end - offset, kind_of(entry))]
        found, units, offsets = self._labelled(table, offset, end, KIND_RUNS)
        kinds = map(KINDS.__getitem__, map(found.__getitem__, units))
        return list(map(Extent, offsets, map(sub, offsets[1:], offsets), kinds))

    async def labels(self, offset: int, length: int, *, with_places: bool) -> Labelled:
        """What clusters a range has, as `BlockNode.labels`; may stop before its end, as `runs`."""
        table, end = await self._stretch(offset, length)
        if table is None:
            return Labelled(b"-", 0, offset, end, None)
        table, end = self._with_following(table, offset, offset + length)
        found, _, stop, end = self._labels_of(table, offset, end, with_places=with_places)
        entries = self._entries_of(table, offset, len(found)) if with_places else None
        start = align_down(offset, self._cluster_size)
        return Labelled(found[:stop], 1 << self._unit_bits, start, end, entries)

    def _with_following(self, table: L2Table, offset: int, end: int) -> tuple[L2Table, int]:
        """A table with the entries of those behind it, too, as far as that needs no waiting; and up to where.

        Tables of small clusters are small: looking at many of them at once costs little more than at one.
        """
        end = min(end, align_down(offset, self._cluster_size) + self._look_length)
        l1_index = offset >> self._table_bits
        first_index, entries = l1_index, table.entries
        while (l1_index + 1) << self._table_bits < end:
            l1_index += 1
            following = self._mapping.tables.get(l1_index) or self._mapping.table_nowait(l1_index)
            if following is None and self._mapping.l1[l1_index]:
                return self._joined(table, entries), l1_index << self._table_bits
            more = following.entries if following is not None else array("Q", bytes(8 * len(table.entries)))
            entries = entries + more
        return (table if l1_index == first_index else self._joined(table, entries)), end

    def _joined(self, table: L2Table, entries: "array[int]") -> L2Table:
        return L2Table(table.host_offset, entries, is_linked=True)

    def entries_told(self, told: Labelled, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """The entry that stands for each of some runs (offset and length) of what `labels` told."""
        entries, labels, start = told.entries, told.labels, told.start
        if entries is None:
            return [0] * len(ranges)
        unit_bits, cluster_bits = self._unit_bits, self._cluster_bits
        if not _NOT_PLAIN.search(labels):
            return [entries[offset - start >> cluster_bits] & OFFSET_MASK for offset, _ in ranges]
        return [
            entries[offset - start >> cluster_bits] & _TOLD_MASKS[labels[offset - start >> unit_bits]]
            | _TOLD_ZEROES[labels[offset - start >> unit_bits]]
            for offset, _ in ranges
        ]

    def _entries_of(self, table: L2Table, offset: int, label_count: int) -> "array[int]":
        """The entries of the clusters with so many labels from `offset`'s on."""
        index = (offset >> self._cluster_bits) & self._index_mask
        return table.entries[index : index + label_count]

    async def unallocated(self, offset: int, length: int) -> tuple[list[Range], int]:
        """What of a range is unallocated, and up to where that is known now."""
        table, end = await self._stretch(offset, length)
        if table is None:
            return [(offset, end)], end
        if end - offset <= self._alike_length and (entry := self.entry_nowait(offset, end - offset)) >= 0:
            return ([] if entry else [(offset, end)]), end
        found, first, stop, end = self._labels_of(table, offset, end, with_places=False)
        bits, base = self._unit_bits, align_down(offset, self._cluster_size)
        runs = islice(NOTHING_RUNS.finditer(found, first, stop), RUN_COUNT_MAX)
        ranges = [(base + (run.start() << bits), base + (run.end() << bits)) for run in runs]
        if not ranges:
            return [], end
        if len(ranges) == RUN_COUNT_MAX:
            end = min(end, ranges[-1][1])
        ranges[0] = max(offset, ranges[0][0]), ranges[0][1]
        ranges[-1] = ranges[-1][0], min(end, ranges[-1][1])
        return ranges, end

    def _few_runs(self, table: L2Table, offset: int, end: int) -> list[tuple[int, int, int]]:
        """The runs of a range, found cluster by cluster; none: something is wrong with one."""
        runs: list[tuple[int, int, int]] = []
        start, first, distance = offset, -1, 0
        for cluster_offset in range(align_down(offset, self._cluster_size), end, self._cluster_size):
            entry = table.entries[(cluster_offset >> self._cluster_bits) & self._index_mask] & STATE_MASK
            if not entry & COMPRESSED:
                if entry & self._odd_mask & OFFSET_MASK:
                    return []
                entry &= _ENTRY_MASK
            if first < 0 or not _continues(first, distance, entry):
                if first >= 0:
                    runs.append((start, cluster_offset - start, first))
                start, first, distance = max(offset, cluster_offset), entry, 0
            distance += self._cluster_size
        runs.append((start, end - start, first))
        return runs

    async def _stretch(self, offset: int, length: int) -> tuple[L2Table | None, int]:
        """The table that maps a range, and up to where it is looked at at once; None: there is nothing."""
        l1_index = offset >> self._table_bits
        table = await self._mapping.table(l1_index)
        if table is None:
            return None, offset + self._unmapped_length(l1_index, offset, length)
        end = min(offset + length, (l1_index + 1) << self._table_bits)
        stop = align_down(offset, self._cluster_size) + self._look_length
        empty_end = self._empty_end(table, offset, end) if stop < end else offset
        if empty_end >= stop:
            return None, empty_end
        return table, min(end, stop)

    def _labelled(
        self, table: L2Table, offset: int, end: int, pattern: "re.Pattern[bytes]"
    ) -> tuple[bytes, list[int], list[int]]:
        """The labels of a range, the number of the unit at which each run of them starts, and its offset.

        The offsets have one more, where the last run ends. A unit is what has a label of its own.

        Raises:   Corruption: the first cluster of the range cannot be. What comes before such a one is told.
        """
        found, first, stop, end = self._labels_of(table, offset, end, with_places=pattern is PLACED_RUNS)
        bits, base = self._unit_bits, align_down(offset, self._cluster_size)
        units = [match.end() for match in islice(pattern.finditer(found, first, stop), RUN_COUNT_MAX)]
        offsets = [offset, *[base + (unit << bits) for unit in units]]
        offsets[-1] = min(offsets[-1], end)
        return found, [first, *units[:-1]], offsets

    def _labels_of(
        self, table: L2Table, offset: int, end: int, *, with_places: bool
    ) -> tuple[bytes, int, int, int]:
        """The labels of a range's clusters, from which to which they are the range's, and where it ends."""
        index = (offset >> self._cluster_bits) & self._index_mask
        count = ((end - 1) >> self._cluster_bits) - (offset >> self._cluster_bits) + 1
        found = self._labels(table, index, count, with_places=with_places)
        bits, base = self._unit_bits, align_down(offset, self._cluster_size)
        first, stop = (offset - base) >> bits, ((end - 1 - base) >> bits) + 1
        impossible = found.find(_IMPOSSIBLE, first, stop)
        if impossible == first:
            raise self._contradiction(table, offset)
        if impossible > 0:
            stop, end = impossible, base + (impossible << bits)
        return found, first, stop, end

    def _entries(self, table: L2Table, offset: int, found: bytes, units: list[int]) -> list[int]:
        """The entries of the clusters of some units, counted from the first one of `offset`'s cluster."""
        index = (offset >> self._cluster_bits) & self._index_mask
        entries = table.entries[index : index + len(found)]
        if b"C" not in found:
            return [entries[unit] & _ENTRY_MASK for unit in units]
        mask_of = {label: STATE_MASK if label in b"Cc" else _ENTRY_MASK for label in b"-0DdCc"}
        return [entries[unit] & mask_of[found[unit]] for unit in units]

    def _labels(self, table: L2Table, index: int, count: int, *, with_places: bool) -> bytes:
        """A label for each cluster; it is apart from the one before only if `with_places`."""
        entries = table.entries[index : index + count]
        if self._is_stored_as_one(entries):
            return (b"D" if with_places else b"d") + b"d" * (count - 1)
        return labels(self._flags(packed(entries), count, with_places=with_places), count)

    def _is_stored_as_one(self, entries: "array[int]") -> bool:
        """Whether all that some entries map is one piece of the file: so it is in images streamed into."""
        first, last, places = entries[0], entries[-1], OFFSET_MASK & -self._cluster_size
        flags = first & ~places
        is_plain = first & places and last & places and flags in (0, COPIED) and last & ~places == flags
        return bool(is_plain) and is_one_run(entries, self._cluster_size)

    def _flags(self, entries: bytes, count: int, *, with_places: bool) -> Iterator[bytes]:
        low, second, *high, top = columns(entries)
        yield low.translate(_ZERO_TABLE)
        yield flagged((second.translate(_SECOND_TABLE), *high), count, STORED)
        yield top.translate(_COMPRESSED_TABLE)
        misplaced = (
            column.translate(odd) for column, odd in zip((second, *high), self._odd_tables, strict=False)
        )
        yield flagged(misplaced, count, IMPOSSIBLE)
        if with_places:
            yield apart(entries, OFFSET_MASK, self._cluster_size)

    def _empty_end(self, table: L2Table, offset: int, end: int) -> int:
        """Where a stretch of unallocated clusters ends that begins at `offset`."""
        size = self._entry_numbers
        index = (offset >> self._cluster_bits) & self._index_mask
        count = ((end - 1) >> self._cluster_bits) - (offset >> self._cluster_bits) + 1
        empty_count = _first_set(table.entries, index * size, (index + count) * size) // size - index
        return min(end, align_down(offset, self._cluster_size) + empty_count * self._cluster_size)

    def _unmapped_length(self, l1_index: int, offset: int, length: int) -> int:
        end = offset + length
        next_index = _first_set(self._mapping.l1, l1_index + 1, ((end - 1) >> self._table_bits) + 1)
        return min(next_index << self._table_bits, end) - offset

    def _contradiction(self, table: L2Table, offset: int) -> Corruption:
        entry = table.entries[(offset >> self._cluster_bits) & self._index_mask]
        return Corruption(
            self._file,
            f"the cluster of guest offset {offset:#x} has the unaligned host offset {entry & OFFSET_MASK:#x}",
        )


def kind_of(entry: int) -> Kind:
    """The kind of clusters with such an entry."""
    if entry & COMPRESSED:
        return Kind.DATA
    if entry & ZERO:
        return Kind.ZERO
    return Kind.DATA if entry else Kind.UNALLOCATED


def _continues(first: int, distance: int, entry: int) -> bool:
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
