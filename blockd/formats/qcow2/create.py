"""Make a new qcow2 image, empty or with its space allocated.

The first clusters are, in this order: header, refcount table, refcount blocks, L1 table; and with
preallocation the L2 tables and the data clusters. The refcount structures count themselves, so their
size is a fixed point.

Order on disk: tables durable → header → durable. Until the header is there the file is no image,
so a crash never leaves one that is half made.

Source:   qcow2 specification, "Header" and "Host cluster management".
"""

import sys
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.block.segments import zeroes
from blockd.errors import RequestError
from blockd.formats.qcow2 import header as qcow2_header
from blockd.formats.qcow2.create_options import (
    CLUSTER_SIZE_DEFAULT,
    REFCOUNT_BITS_DEFAULT,
    CreateOptions,
)
from blockd.formats.qcow2.header import EXTENSION_BACKING_FORMAT, Extension, Header
from blockd.units import MIB

_ENTRY_SIZE = 8
_COPIED = 1 << 63
_CHUNK = 1 * MIB
# What one thread hop writes at most, so that making a large image can be cancelled.
_HOP_SIZE = 64 * MIB


class _Layout(NamedTuple):
    """How many clusters each structure takes."""

    table: int
    blocks: int
    l1: int
    l2: int
    data: int

    @property
    def total(self) -> int:
        return 1 + sum(self)

    @property
    def first_block(self) -> int:
        return 1 + self.table

    @property
    def first_l1(self) -> int:
        return self.first_block + self.blocks

    @property
    def first_l2(self) -> int:
        return self.first_l1 + self.l1

    @property
    def first_data(self) -> int:
        return self.first_l2 + self.l2


async def create(
    file: ProtocolNode,
    size: int,
    *,
    backing_filename: str | None = None,
    backing_format: str | None = None,
    cluster_size: int = CLUSTER_SIZE_DEFAULT,
    compat: str = "1.1",
    refcount_bits: int = REFCOUNT_BITS_DEFAULT,
    lazy_refcounts: bool = False,
    extended_l2: bool = False,
    compression_type: str = "zlib",
    preallocation: str = "off",
) -> None:
    """Turn `file` into an image of `size` bytes that reads as zeroes; durable on return.

    Raises:   RequestError: the options cannot be, or not together; nothing was written.
    Fails to: the file is no qcow2 image.
    """
    options = CreateOptions(
        size=size,
        backing_filename=backing_filename,
        backing_format=backing_format,
        cluster_size=cluster_size,
        compat=compat,
        refcount_bits=refcount_bits,
        lazy_refcounts=lazy_refcounts,
        extended_l2=extended_l2,
        compression_type=compression_type,
        preallocation=preallocation,
    )
    await create_image(file, options)


async def create_image(file: ProtocolNode, options: CreateOptions) -> None:
    """Turn `file` into an image as the options describe it; durable on return.

    Raises:   RequestError: the options cannot be, or not together; nothing was written.
    Fails to: the file is no qcow2 image.
    Cancel:   as when it fails.
    """
    options.check()
    layout = _layout(options)
    cluster = qcow2_header.pack(_header(options, layout))
    steps = _write_image(file, options, layout, cluster)
    while await in_thread(next, steps, None) is not None:
        pass


def _header(options: CreateOptions, layout: _Layout) -> Header:
    cluster_bits = options.cluster_size.bit_length() - 1
    l1_entry_count = _l1_entry_count(options)
    extensions: tuple[Extension, ...] = ()
    if options.backing_filename and options.backing_format:
        extensions = (Extension(EXTENSION_BACKING_FORMAT, options.backing_format.encode()),)
    compression_type = qcow2_header.COMPRESSION_TYPES.index(options.compression_type)
    incompatible = qcow2_header.INCOMPATIBLE_COMPRESSION if compression_type else 0
    incompatible |= qcow2_header.INCOMPATIBLE_EXTENDED_L2 if options.extended_l2 else 0
    return Header(
        version=options.version,
        cluster_bits=cluster_bits,
        size=options.size,
        l1_entry_count=l1_entry_count,
        l1_offset=layout.first_l1 << cluster_bits if l1_entry_count else 0,
        refcount_table_offset=options.cluster_size,
        refcount_table_clusters=layout.table,
        refcount_order=options.refcount_bits.bit_length() - 1,
        incompatible=incompatible,
        compatible=qcow2_header.COMPATIBLE_LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        compression_type=compression_type,
        header_length=qcow2_header.HEADER_LENGTH if options.version > 2 else qcow2_header.HEADER_LENGTH_V2,
        backing_filename=options.backing_filename,
        extensions=extensions,
    )


def _l1_entry_count(options: CreateOptions) -> int:
    return qcow2_header.l1_entry_count_for(
        options.size, options.cluster_size.bit_length() - 1, options.l2_entry_size
    )


def _layout(options: CreateOptions) -> _Layout:
    """Grow the refcount structures until they cover everything, themselves included."""
    cluster_size = options.cluster_size
    l1_entry_count = _l1_entry_count(options)
    is_preallocated = options.preallocation != "off"
    layout = _Layout(
        table=1,
        blocks=1,
        l1=-(-l1_entry_count * _ENTRY_SIZE // cluster_size),
        l2=l1_entry_count if is_preallocated else 0,
        data=-(-options.size // cluster_size) if is_preallocated else 0,
    )
    while True:
        blocks = -(-layout.total * options.refcount_bits // (cluster_size * 8))
        table = -(-blocks * _ENTRY_SIZE // cluster_size)
        if table * cluster_size > qcow2_header.REFCOUNT_TABLE_SIZE_MAX:
            raise RequestError(
                f"Image size {options.size} is too large to be preallocated in clusters of {cluster_size} "
                f"bytes with {options.refcount_bits}-bit refcounts"
            )
        if (table, blocks) == (layout.table, layout.blocks):
            return layout
        layout = layout._replace(table=table, blocks=blocks)


# -- writing --------------------------------------------------------------------------------------


def _write_image(
    file: ProtocolNode, options: CreateOptions, layout: _Layout, cluster: bytes
) -> Iterator[bool]:
    """Write everything, each step not too long for one thread hop."""
    was_used = file.size > 0  # a block device, or a file used before: whatever it was, it is that no longer
    if was_used:
        file.write_blocking(0, zeroes(len(cluster)))
        file.sync_blocking()
        yield True
    yield from _write_refcounts(file, options, layout)
    yield from _write_map(file, options, layout)
    yield from _preallocate(file, options, layout, was_used=was_used)
    file.sync_blocking()
    file.write_blocking(0, cluster)
    file.sync_blocking()


def _write_refcounts(file: ProtocolNode, options: CreateOptions, layout: _Layout) -> Iterator[bool]:
    """Write the refcount table and its blocks, which say that each cluster is used once."""
    cluster_size = options.cluster_size
    first, end = layout.first_block * cluster_size, layout.first_l1 * cluster_size
    table = _packed(array("Q", range(first, end, cluster_size)))
    file.write_blocking(cluster_size, table.ljust(layout.table * cluster_size, b"\0"))
    yield True
    per_chunk = _CHUNK * 8 // options.refcount_bits
    ones = _ones(options.refcount_bits, min(per_chunk, layout.total))
    offset, rest = first, layout.total
    while rest:
        chunk = ones if rest >= per_chunk else _ones(options.refcount_bits, rest)
        file.write_blocking(offset, chunk)
        offset, rest = offset + len(chunk), max(0, rest - per_chunk)
        yield True
    file.write_blocking(offset, zeroes(end - offset))


def _ones(bits: int, count: int) -> bytes:
    """`count` refcounts of 1, each `bits` wide; below a byte the lowest bits come first."""
    if bits >= 8:
        return (1).to_bytes(bits // 8, "big") * count
    whole, rest = divmod(count, 8 // bits)
    pattern = sum(1 << shift for shift in range(0, 8, bits))
    last = pattern & (1 << rest * bits) - 1
    return bytes([pattern]) * whole + bytes([last] if rest else [])


def _packed(entries: "array[int]") -> bytes:
    if sys.byteorder == "little":
        entries.byteswap()
    return entries.tobytes()


def _write_map(file: ProtocolNode, options: CreateOptions, layout: _Layout) -> Iterator[bool]:
    """Write the L1 table, empty or with the L2 tables of a preallocated image."""
    cluster_size = options.cluster_size
    offset = layout.first_l1 * cluster_size
    if not layout.l2:
        yield from _write_zeroes(file, offset, layout.l1 * cluster_size)
        return
    first, end, data_end = (
        cluster * cluster_size for cluster in (layout.first_l2, layout.first_data, layout.total)
    )
    l1 = _packed(array("Q", range(first | _COPIED, end | _COPIED, cluster_size)))
    file.write_blocking(offset, l1.ljust(layout.l1 * cluster_size, b"\0"))
    yield True
    # The tables are neighbours and all but the last are full: together they are one list of entries.
    step = _CHUNK // options.l2_entry_size
    for host_offset in range(end, data_end, step * cluster_size):
        chunk_end = min(host_offset + step * cluster_size, data_end)
        entries = array("Q", range(host_offset | _COPIED, chunk_end | _COPIED, cluster_size))
        if options.extended_l2:  # no subcluster is marked: the space is there, the content is the backing's
            halves, entries = entries, array("Q", bytes(2 * _ENTRY_SIZE * len(entries)))
            entries[::2] = halves
        file.write_blocking(first, packed := _packed(entries))
        first += len(packed)
        yield True
    file.write_blocking(first, zeroes(end - first))


def _preallocate(
    file: ProtocolNode, options: CreateOptions, layout: _Layout, *, was_used: bool
) -> Iterator[bool]:
    """Make the data clusters be there, and read as zeroes."""
    start, end = (cluster * options.cluster_size for cluster in (layout.first_data, layout.total))
    if start == end:
        return
    if options.preallocation == "full":
        yield from _write_zeroes(file, start, end - start)
        return
    if file.size < end:
        file.truncate_blocking(end)
    if was_used:
        file.punch_hole_blocking(start, end - start)
    yield True
    if options.preallocation == "falloc" and not file.allocate_blocking(start, end - start):
        yield from _write_zeroes(file, start, end - start)


def _write_zeroes(file: ProtocolNode, offset: int, length: int) -> Iterator[bool]:
    """Write real zeroes: a table must lie inside the file, and a used device holds something else."""
    end = offset + length
    while offset < end:
        hop_end = min(offset + _HOP_SIZE, end)
        while offset < hop_end:
            count = min(_CHUNK, hop_end - offset)
            file.write_blocking(offset, zeroes(count))
            offset += count
        yield True
