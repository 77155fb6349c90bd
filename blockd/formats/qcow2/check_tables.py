"""What a check reads besides refcounts: the header, tables of entries, snapshot table, bitmap directory."""

import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

from blockd.block.node import ProtocolNode
from blockd.formats.qcow2 import header as qcow2_header
from blockd.formats.qcow2.findings import Findings
from blockd.formats.qcow2.header import L1_SIZE_MAX, Header
from blockd.units import MIB, align_up

# QEMU's limits, far beyond what anyone uses.
SNAPSHOT_COUNT_MAX = 65536
SNAPSHOT_TABLE_SIZE_MAX = 64 * MIB
BITMAP_COUNT_MAX = 65535
BITMAP_DIRECTORY_SIZE_MAX = 64 * MIB
BITMAP_TABLE_SIZE_MAX = 256 * MIB

_PIECE_ENTRY_COUNT = MIB // 8
_BITMAPS = struct.Struct(">IIQQ")
_SNAPSHOT = struct.Struct(">QIHH20xI")
_BITMAP = struct.Struct(">QI6xHI")
_ROW_SIZE = 40  # the longer of the two fixed parts
_SNAPSHOT_TABLE = "snapshot table"
_BITMAP_DIRECTORY = "bitmap directory"


class Entries(NamedTuple):
    """A table of 64-bit entries in the image file."""

    name: str
    offset: int
    entry_count: int

    @property
    def length(self) -> int:
        return self.entry_count * 8


class Directory(NamedTuple):
    """A directory with what it lists, as far as it could be read."""

    name: str
    offset: int
    length: int
    tables: list[Entries]


class _Row(NamedTuple):
    """One entry of a directory: the table it names and its own length."""

    table: Entries
    length: int


_Parse = Callable[[bytes, int], _Row]


def read_header(file: ProtocolNode) -> Header:
    """Read and parse the header, also of an image that blockd could not open.

    Raises:   ImageError: no qcow2 image, or a field is wrong.
    """
    buffer = bytearray(min(file.size, 1 << qcow2_header.CLUSTER_BITS_MAX))
    file.readinto_blocking(0, memoryview(buffer))
    return qcow2_header.parse(bytes(buffer), file.filename, supported_only=False)


def read_entries(file: ProtocolNode, offset: int, count: int) -> "array[int]":
    """Read `count` big-endian 64-bit entries."""
    entries = array("Q", bytes(count * 8))
    file.readinto_blocking(offset, memoryview(entries).cast("B"))
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def used_entries(file: ProtocolNode, table: Entries) -> Iterator[tuple[int, int]]:
    """The entries of a table that are not 0, and where they stand: a piece of a large table at a time."""
    for start in range(0, table.entry_count, _PIECE_ENTRY_COUNT):
        offset = table.offset + start * 8
        entries = read_entries(file, offset, min(_PIECE_ENTRY_COUNT, table.entry_count - start))
        if any(entries):
            yield from ((offset + index * 8, entry) for index, entry in enumerate(entries) if entry)


def snapshots(file: ProtocolNode, header: Header, findings: Findings) -> Directory:
    """Find the L1 tables of the internal snapshots."""
    count = header.snapshot_count
    found = Directory(_SNAPSHOT_TABLE, header.snapshots_offset, 0, [])
    if count > SNAPSHOT_COUNT_MAX:
        findings.wrong("header", 60, f"{count} snapshots are more than {SNAPSHOT_COUNT_MAX}")
        return found
    rows = _rows(file, header.snapshots_offset, count, SNAPSHOT_TABLE_SIZE_MAX, _parse_snapshot)
    return _read_directory(
        found,
        rows,
        count=count,
        cluster_size=header.cluster_size,
        table_size_max=L1_SIZE_MAX,
        findings=findings,
    )


def bitmaps(file: ProtocolNode, header: Header, findings: Findings) -> Directory:
    """Find the tables of the persistent bitmaps, unless the image says that they are out of date."""
    data = header.extension(qcow2_header.EXTENSION_BITMAPS) or b""
    if not header.autoclear & qcow2_header.AUTOCLEAR_BITMAPS:
        return Directory(_BITMAP_DIRECTORY, 0, 0, [])
    if len(data) != _BITMAPS.size:
        findings.wrong("header", 0, f"the bitmaps extension has {len(data)} bytes, not 24")
        return Directory(_BITMAP_DIRECTORY, 0, 0, [])
    count, _, length, offset = _BITMAPS.unpack(data)
    found = Directory(_BITMAP_DIRECTORY, offset, 0, [])
    if count > BITMAP_COUNT_MAX or length > BITMAP_DIRECTORY_SIZE_MAX or offset % header.cluster_size:
        findings.wrong("header", 0, f"a bitmap directory of {count} bitmaps at {offset:#x} cannot be")
        return found
    rows = _rows(file, offset, count, length, _parse_bitmap)
    return _read_directory(
        found,
        rows,
        count=count,
        cluster_size=header.cluster_size,
        table_size_max=BITMAP_TABLE_SIZE_MAX,
        findings=findings,
    )


def _read_directory(
    found: Directory,
    rows: Iterator[_Row],
    *,
    count: int,
    cluster_size: int,
    table_size_max: int,
    findings: Findings,
) -> Directory:
    """Take what rows there are; say which of them are wrong or that some are missing."""
    length = row_count = 0
    for row in rows:
        table = row.table
        if table.offset % cluster_size or table.length > table_size_max:
            where = f"{table.name} of {table.entry_count} entries at {table.offset:#x}"
            findings.wrong(found.name, found.offset + length, f"{where} cannot be")
        else:
            found.tables.append(table)
        length += row.length
        row_count += 1
    if row_count < count:
        findings.wrong(found.name, found.offset, f"ends after {row_count} of {count} entries")
    return found._replace(length=length)


def _rows(file: ProtocolNode, offset: int, count: int, length_max: int, parse: _Parse) -> Iterator[_Row]:
    """Read rows one after the other, as long as they are inside the file and the limit."""
    # The last row's padding may be missing: QEMU does not write it.
    end = align_up(min(file.size, offset + length_max), 8)
    for index in range(count):
        if offset >= end:
            return
        data = bytearray(_ROW_SIZE)
        file.readinto_blocking(offset, memoryview(data))
        row = parse(bytes(data), index)
        if offset + row.length > end:
            return
        yield row
        offset += row.length


def _parse_snapshot(data: bytes, index: int) -> _Row:
    l1_offset, l1_entry_count, id_length, name_length, extra_length = _SNAPSHOT.unpack_from(data)
    table = Entries(f"L1 table of snapshot {index}", l1_offset, l1_entry_count)
    return _Row(table, align_up(_SNAPSHOT.size + extra_length + id_length + name_length, 8))


def _parse_bitmap(data: bytes, index: int) -> _Row:
    offset, entry_count, name_length, extra_length = _BITMAP.unpack_from(data)
    table = Entries(f"table of bitmap {index}", offset, entry_count)
    return _Row(table, align_up(_BITMAP.size + extra_length + name_length, 8))
