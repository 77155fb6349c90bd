"""Where the fields, tables and names of an image are: what a mutator has to know of a format.

A format that is not described here is taken for words of every width and order in its first sector.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Order = Literal["big", "little"]

_QCOW2_OFFSET = 0x00FF_FFFF_FFFF_FE00
# Entries of one table; of larger ones the first are enough.
_ENTRY_COUNT_MAX = 512
_TEXT = re.compile(rb"[ -~]{5,}")


class Place(NamedTuple):
    """A number in the file."""

    name: str
    offset: int
    width: int
    order: Order

    def get(self, data: bytes | bytearray) -> int:
        return int.from_bytes(data[self.offset : self.offset + self.width], self.order)

    def put(self, data: bytearray, value: int) -> None:
        """Overwrite the number, unless the file ends before."""
        value &= (1 << self.width * 8) - 1
        if self.offset + self.width <= len(data):
            data[self.offset : self.offset + self.width] = value.to_bytes(self.width, self.order)


@dataclass
class Places:
    """All of them. `flags`: bits of a table's entries that are no part of the offset in it."""

    cluster_size: int = 512
    fields: list[Place] = field(default_factory=list)
    entries: list[list[Place]] = field(default_factory=list)
    flags: tuple[int, ...] = (0,)
    # Where the offset and the length of the backing file's name stand.
    name: tuple[Place, Place] | None = None
    # Runs of text: names, most of them.
    texts: list[tuple[int, int]] = field(default_factory=list)


def places_of(image_format: str, data: bytes) -> Places:
    """Look a sound image up."""
    places = _PLACES.get(image_format, _words)(data)
    places.texts = [match.span() for match in _TEXT.finditer(data[:4096])]
    return places


def _table(name: str, offset: int, count: int, width: int, order: Order) -> list[Place]:
    count = min(count, _ENTRY_COUNT_MAX)
    return [Place(name, offset + index * width, width, order) for index in range(count)]


def _qcow2(data: bytes) -> Places:
    def big(name: str, offset: int, width: int) -> Place:
        return Place(name, offset, width, "big")

    version, cluster_bits = struct.unpack_from(">I", data, 4)[0], struct.unpack_from(">I", data, 20)[0]
    l1_count, l1_offset, table_offset, table_clusters, snapshot_count, snapshots = struct.unpack_from(
        ">IQQIIQ", data, 36
    )
    cluster_size = 1 << cluster_bits
    name = (big("backing offset", 8, 8), big("backing length", 16, 4))
    places = Places(cluster_size, flags=(0, 1, 1 << 63, 1 << 62, 3 << 62, 1 << 63 | 1), name=name)
    places.fields = [
        *(big(f"u32 at {offset}", offset, 4) for offset in (4, 16, 20, 32, 36, 56, 60)),
        *(big(f"u64 at {offset}", offset, 8) for offset in (8, 24, 40, 48, 64)),
    ]
    header_length, refcount_order = 72, 4
    if version > 2:
        refcount_order, header_length = struct.unpack_from(">II", data, 96)
        places.fields += [big(f"u64 at {offset}", offset, 8) for offset in (72, 80, 88)]
        places.fields += [big("refcount order", 96, 4), big("header length", 100, 4), big("type", 104, 1)]
    places.fields += _qcow2_extensions(data, header_length)
    for index in range(snapshot_count):
        # Rows differ in length; the fields of the first are known, and words are good for the others.
        places.fields += _table(f"snapshot {index}", snapshots + index * 40, 10, 4, "big")
    tables = [("L1", l1_offset, l1_count)]
    if snapshot_count:
        tables.append(("snapshot L1", *struct.unpack_from(">QI", data, snapshots)))
    for what, offset, count in tables:
        table = _table(what, offset, count, 8, "big")
        places.entries.append(table)
        for l2_offset in _followed(table, data):
            places.entries.append(_table("L2", l2_offset, cluster_size // 8, 8, "big"))
    table = _table("refcount table", table_offset, table_clusters * cluster_size // 8, 8, "big")
    places.entries.append(table[:32])
    width = max(1, (1 << refcount_order) // 8)
    for block in _followed(table, data):
        places.entries.append(_table("refcount block", block, min(64, cluster_size // width), width, "big"))
    return places


def _qcow2_extensions(data: bytes, offset: int) -> Iterator[Place]:
    while offset + 8 <= len(data):
        kind, length = struct.unpack_from(">II", data, offset)
        yield Place("extension type", offset, 4, "big")
        yield Place("extension length", offset + 4, 4, "big")
        if not kind:
            return
        if kind == 0x23852875:  # bitmaps: their fields, and the directory's first words
            yield from _table("bitmaps", offset + 8, 6, 4, "big")
            yield from _table(
                "bitmap directory", struct.unpack_from(">Q", data, offset + 24)[0], 16, 4, "big"
            )
        offset += 8 + (length + 7 & ~7)


def _followed(table: list[Place], data: bytes) -> Iterator[int]:
    """The tables that the entries of a table name."""
    for entry in table:
        offset = entry.get(data) & _QCOW2_OFFSET
        if 0 < offset < len(data):
            yield offset


def _qed(data: bytes) -> Places:
    def little(name: str, offset: int, width: int) -> Place:
        return Place(name, offset, width, "little")

    cluster_size, table_size = struct.unpack_from("<II", data, 4)
    l1_offset = struct.unpack_from("<Q", data, 40)[0]
    name = (little("backing offset", 56, 4), little("backing length", 60, 4))
    places = Places(cluster_size, flags=(0, 1), name=name)
    places.fields = [
        *(little(f"u32 at {offset}", offset, 4) for offset in (4, 8, 12, 56, 60)),
        *(little(f"u64 at {offset}", offset, 8) for offset in (16, 24, 32, 40, 48)),
    ]
    entry_count = cluster_size * table_size // 8
    table = _table("L1", l1_offset, entry_count, 8, "little")
    places.entries = [table[:8]]
    places.entries += [_table("L2", l2, entry_count, 8, "little") for l2 in _followed(table, data)]
    return places


def _words(data: bytes) -> Places:
    """What can be said of an unknown format."""
    places = Places()
    end = min(512, len(data))
    orders: tuple[Order, Order] = ("big", "little")
    for width in (1, 2, 4, 8):
        for order in orders:
            where = range(0, end - width + 1, width)
            places.fields += [Place(f"{order} u{width * 8} at {at}", at, width, order) for at in where]
    return places


_PLACES: dict[str, Callable[[bytes], Places]] = {"qcow2": _qcow2, "qed": _qed}
