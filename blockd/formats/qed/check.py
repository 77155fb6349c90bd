"""Check a QED image: does every table name clusters that there are, and each of them once?

The check goes from the L1 table over all L2 tables and notes which host clusters are named. It reads the
tables straight from the file and shares no code with what writes them, so that it can judge it.

    named by nobody      a leak: space is lost, nothing else
    named twice          corruption: two places of the disk are the same
    not a cluster        corruption: not aligned, in the header, or not wholly inside the file

The numbers in the report mean what `qemu-img check` means by them.

Source:   QED specification, "Consistency checking".
"""

import re
import sys
from array import array
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.errors import ImageError
from blockd.extents import Extent, Kind
from blockd.formats.check_report import CheckReport
from blockd.formats.qed import header as qed_header
from blockd.formats.qed.header import Header
from blockd.units import MIB, SECTOR_SIZE

# What the check keeps in memory is a bit a host cluster; this many are 64 MiB.
HOST_CLUSTER_COUNT_MAX = 1 << 29

_ENTRY_SIZE = 8
_ZERO = 1
# Tables are read in pieces of this size.
_CHUNK = 1 * MIB
# What ends a row of equal bytes.
_OTHER_BYTE = {0x00: re.compile(rb"[^\x00]"), 0xFF: re.compile(rb"[^\xff]")}


class Found(NamedTuple):
    """What a check found out."""

    report: CheckReport
    bad_entries: list[int]  # where entries stand that name what is no cluster or no table
    leaks: list[tuple[int, int]]  # host offset and cluster count of what nobody names


async def check(file: ProtocolNode) -> CheckReport:
    """Check the image in `file`, which must not be written meanwhile.

    Raises:   ImageError: the header is so wrong that nothing behind it can be looked at, or the file is
              too large to be checked in bounded memory.
    Cancel:   between two pieces of a table.
    """
    return (await examine(file)).report


async def examine(file: ProtocolNode) -> Found:
    """Check, and tell all that a repair needs to know. Raises: as `check`."""
    return await _Checker(file, await in_thread(read_header, file)).run()


def read_header(file: ProtocolNode) -> Header:
    """Read what the check starts from.

    Raises:   ImageError: see `check`.
    """
    buffer = bytearray(min(file.size, SECTOR_SIZE))
    if buffer:
        file.readinto_blocking(0, memoryview(buffer))
    header = qed_header.parse(bytes(buffer), file.filename)
    if header.l1_offset + header.table_length > file.size:
        raise ImageError(f"'{file.filename}' cannot be checked: its L1 table runs past the end of the file")
    if file.size // header.cluster_size > HOST_CLUSTER_COUNT_MAX:
        raise ImageError(
            f"'{file.filename}' cannot be checked: {file.size} bytes are more than "
            f"{HOST_CLUSTER_COUNT_MAX} clusters of {header.cluster_size} bytes"
        )
    return header


class _Checker:
    """One run over one image."""

    def __init__(self, file: ProtocolNode, header: Header) -> None:
        self._file = file
        self._header = header
        self._host_cluster_count = file.size // header.cluster_size
        self._used = bytearray(-(-self._host_cluster_count // 8))
        self._report = CheckReport(
            file.filename, total_clusters=-(-header.size // header.cluster_size), is_dirty=header.needs_check
        )
        self._bad_entries: list[int] = []

    async def run(self) -> Found:
        header = self._header
        self._use(header.l1_offset, header.table_size)
        async for where, entries in self._pieces(header.l1_offset):
            for index, entry in enumerate(entries):
                if entry and self._is_table(where + index * _ENTRY_SIZE, entry):
                    await self._check_l2(entry)
        leaks = await in_thread(self._find_leaks)
        return Found(self._report, self._bad_entries, leaks)

    async def _pieces(self, table_offset: int) -> AsyncIterator[tuple[int, "array[int]"]]:
        """The pieces of a table in which there is anything, each with its place in the file."""
        end = table_offset + self._header.table_length
        offset = table_offset
        while offset < end:
            extents = await self._file.map(offset, end - offset)
            for extent in extents:
                if extent.kind is not Kind.ZERO:
                    for piece in _cut(extent):
                        yield piece[0], await in_thread(self._read, *piece)
            offset = extents[-1].end

    def _read(self, offset: int, length: int) -> "array[int]":
        entries = array("Q", bytes(length))
        self._file.readinto_blocking(offset, memoryview(entries).cast("B"))
        if sys.byteorder == "big":
            entries.byteswap()
        return entries

    # -- tables -----------------------------------------------------------------------------------

    def _is_table(self, where: int, entry: int) -> bool:
        """Check an L1 entry; True when the table it names can be looked at."""
        header = self._header
        is_inside = header.first_cluster <= entry and entry + header.table_length <= self._file.size
        if entry % header.cluster_size or not is_inside:
            self._add_bad("L1 table", where, f"entry {entry:#x} is not a table inside the file")
            return False
        if repeated := self._use(entry, header.table_size):
            self._add_repeated("L1 table", where, f"the table at {entry:#x}", repeated)
            return False
        return True

    async def _check_l2(self, table_offset: int) -> None:
        last = 0
        async for where, entries in self._pieces(table_offset):
            last = await in_thread(self._check_entries, where, entries, last)

    def _check_entries(self, where: int, entries: "array[int]", last: int) -> int:
        """Check a piece of an L2 table; `last`: the data cluster before it. Returns the last one in it."""
        report, header = self._report, self._header
        for index, entry in enumerate(entries):
            if entry <= _ZERO:
                continue
            report.allocated_clusters += 1
            report.fragmented_clusters += bool(last) and last + header.cluster_size != entry
            last = entry
            is_inside = header.first_cluster <= entry and entry + header.cluster_size <= self._file.size
            if entry % header.cluster_size or not is_inside:
                message = f"entry {entry:#x} is not a cluster inside the file"
                self._add_bad("L2 table", where + index * _ENTRY_SIZE, message)
            elif repeated := self._use(entry, 1):
                self._add_repeated(
                    "L2 table", where + index * _ENTRY_SIZE, f"the cluster at {entry:#x}", repeated
                )
        return last

    def _add_bad(self, table: str, where: int, message: str) -> None:
        self._report.add_corruption(table, where, message)
        self._bad_entries.append(where)

    def _add_repeated(self, table: str, where: int, what: str, count: int) -> None:
        for _ in range(count):
            self._report.add_corruption(table, where, f"{what} is in use already")

    # -- clusters ---------------------------------------------------------------------------------

    def _use(self, offset: int, cluster_count: int) -> int:
        """Note that clusters are named; returns how many of them had been already."""
        first = offset // self._header.cluster_size
        repeated = 0
        for cluster in range(first, first + cluster_count):
            byte, bit = cluster >> 3, 1 << (cluster & 7)
            repeated += bool(self._used[byte] & bit)
            self._used[byte] |= bit
        end = offset + cluster_count * self._header.cluster_size
        self._report.image_end_offset = max(self._report.image_end_offset, end)
        return repeated

    def _find_leaks(self) -> list[tuple[int, int]]:
        size = self._header.cluster_size
        leaks: list[tuple[int, int]] = []
        for first, end in self._unused():
            leaks.append((first * size, end - first))
            self._report.add_leak(
                first * size, f"{end - first} clusters from {first * size:#x} on are in no table"
            )
            self._report.leaks += end - first - 1
        return leaks

    def _unused(self) -> Iterator[tuple[int, int]]:
        """Ranges of clusters that nothing names, by number; bytes that are all alike are stepped over."""
        start: int | None = None
        cluster = self._header.header_size
        while cluster < self._host_cluster_count:
            byte = self._used[cluster >> 3]
            is_used = byte >> (cluster & 7) & 1
            if is_used and start is not None:
                yield start, cluster
                start = None
            elif not is_used and start is None:
                start = cluster
            is_all_alike = not cluster & 7 and byte in _OTHER_BYTE
            cluster = self._next_other(cluster, byte) if is_all_alike else cluster + 1
        if start is not None:
            yield start, self._host_cluster_count

    def _next_other(self, cluster: int, byte: int) -> int:
        """The first cluster from `cluster` on in another byte than this one, which may be far away."""
        found = _OTHER_BYTE[byte].search(self._used, cluster >> 3)
        return found.start() << 3 if found else self._host_cluster_count


def _cut(extent: Extent) -> Iterator[tuple[int, int]]:
    """Pieces of an extent for reading, whole entries each."""
    start, end = extent.offset & -_ENTRY_SIZE, -(-extent.end // _ENTRY_SIZE) * _ENTRY_SIZE
    for offset in range(start, end, _CHUNK):
        yield offset, min(_CHUNK, end - offset)
