"""Make a new, empty qcow2 image: version 3, 16-bit refcounts.

The first clusters are, in this order: header, refcount table, refcount blocks, L1 table. The
refcount structures count themselves, so their size is a fixed point.

Order on disk: tables durable → header → durable. Until the header is there the file is no image,
so a crash never leaves one that is half made.

Source:   qcow2 specification, "Header" and "Host cluster management".
"""

from typing import NamedTuple

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.block.segments import zeroes
from blockd.errors import RequestError
from blockd.formats.qcow2 import header as qcow2_header
from blockd.formats.qcow2.header import EXTENSION_BACKING_FORMAT, Extension, Header
from blockd.units import MIB, SECTOR_SIZE, align_up, format_size

CLUSTER_SIZE_DEFAULT = 65536

_REFCOUNT_SIZE = 2
_ENTRY_SIZE = 8
_CHUNK = 1 * MIB


class _Layout(NamedTuple):
    """How many clusters each structure takes."""

    table: int
    blocks: int
    l1: int

    @property
    def total(self) -> int:
        return 1 + self.table + self.blocks + self.l1


async def create(
    file: ProtocolNode,
    size: int,
    *,
    backing_filename: str | None = None,
    backing_format: str | None = None,
    cluster_size: int = CLUSTER_SIZE_DEFAULT,
) -> None:
    """Turn `file` into an empty image of `size` bytes; durable on return.

    Raises:   RequestError: the size, cluster size or backing link cannot be; nothing was written.
    Fails to: the file is no qcow2 image.
    """
    _check_sizes(size, cluster_size)
    header = _header(size, cluster_size.bit_length() - 1, _backing_link(backing_filename, backing_format))
    cluster = qcow2_header.pack(header)
    await in_thread(_write_image, file, header, cluster)


def _check_sizes(size: int, cluster_size: int) -> None:
    bits = cluster_size.bit_length() - 1
    in_range = qcow2_header.CLUSTER_BITS_MIN <= bits <= qcow2_header.CLUSTER_BITS_MAX
    if not in_range or cluster_size != 1 << bits:
        raise RequestError(f"Cluster size {cluster_size} must be a power of two between 512 and 2M")
    if size < 0 or size % SECTOR_SIZE:
        raise RequestError(f"Image size {size} must be a positive multiple of 512 bytes")
    largest = qcow2_header.L1_SIZE_MAX // _ENTRY_SIZE * (cluster_size // _ENTRY_SIZE) * cluster_size
    if size > largest:
        raise RequestError(
            f"Image size {size} is too large for clusters of {cluster_size} bytes: "
            f"at most {largest} ({format_size(largest)}); larger clusters allow more"
        )


def _backing_link(filename: str | None, backing_format: str | None) -> tuple[str, str] | None:
    if filename is None and backing_format is None:
        return None
    if not filename:
        raise RequestError("A backing format was given without a backing file")
    if not backing_format:
        raise RequestError(
            f"The backing file '{filename}' needs its format with it, for example 'qcow2' or 'raw'"
        )
    if "\0" in filename:
        raise RequestError("The backing file name has a NUL character in it")
    return filename, backing_format


def _header(size: int, cluster_bits: int, link: tuple[str, str] | None) -> Header:
    l1_entry_count = qcow2_header.l1_entry_count_for(size, cluster_bits)
    layout = _layout(l1_entry_count, cluster_bits)
    l1_cluster = layout.total - layout.l1
    return Header(
        version=3,
        cluster_bits=cluster_bits,
        size=size,
        l1_entry_count=l1_entry_count,
        l1_offset=l1_cluster << cluster_bits if l1_entry_count else 0,
        refcount_table_offset=1 << cluster_bits,
        refcount_table_clusters=layout.table,
        backing_filename=link[0] if link else None,
        extensions=(Extension(EXTENSION_BACKING_FORMAT, link[1].encode()),) if link else (),
    )


def _layout(l1_entry_count: int, cluster_bits: int) -> _Layout:
    """Grow the refcount structures until they cover everything, themselves included."""
    cluster_size = 1 << cluster_bits
    layout = _Layout(1, 1, align_up(l1_entry_count * _ENTRY_SIZE, cluster_size) >> cluster_bits)
    while True:
        blocks = align_up(layout.total * _REFCOUNT_SIZE, cluster_size) >> cluster_bits
        table = align_up(blocks * _ENTRY_SIZE, cluster_size) >> cluster_bits
        if (table, blocks) == (layout.table, layout.blocks):
            return layout
        layout = layout._replace(table=table, blocks=blocks)


def _write_image(file: ProtocolNode, header: Header, cluster: bytes) -> None:
    if file.size:  # a block device, or a file used before: whatever it was, it is that no longer
        file.write_blocking(0, zeroes(len(cluster)))
        file.sync_blocking()
    layout = _layout(header.l1_entry_count, header.cluster_bits)
    offset = header.refcount_table_offset
    first_block = 1 + layout.table
    entries = b"".join(
        (block << header.cluster_bits).to_bytes(_ENTRY_SIZE, "big")
        for block in range(first_block, first_block + layout.blocks)
    )
    tables = entries.ljust(layout.table << header.cluster_bits, b"\0")
    counts = (1).to_bytes(_REFCOUNT_SIZE, "big") * layout.total
    tables += counts.ljust(layout.blocks << header.cluster_bits, b"\0")
    file.write_blocking(offset, tables)
    _write_zeroes(file, offset + len(tables), layout.l1 << header.cluster_bits)
    file.sync_blocking()
    file.write_blocking(0, cluster)
    file.sync_blocking()


def _write_zeroes(file: ProtocolNode, offset: int, length: int) -> None:
    """Write real zeroes: a table must lie inside the file, and a used device holds something else."""
    end = offset + length
    while offset < end:
        count = min(_CHUNK, end - offset)
        file.write_blocking(offset, zeroes(count))
        offset += count
