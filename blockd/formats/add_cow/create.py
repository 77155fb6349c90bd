"""Make a new add-cow file beside an image: no cluster is in the image yet.

Order on disk: bitmap and names durable → first sector of the header → durable. Until that sector is there
the file is no add-cow file, so a crash never leaves one that is half made.
"""

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.block.segments import zeroes
from blockd.errors import RequestError
from blockd.formats.add_cow import header as headers
from blockd.units import MIB, SECTOR_SIZE

CLUSTER_SIZE_DEFAULT = 65536

_CHUNK = 1 * MIB


async def create(
    file: ProtocolNode,
    size: int,
    *,
    image_filename: str,
    backing_filename: str | None = None,
    backing_format: str | None = None,
    cluster_size: int = CLUSTER_SIZE_DEFAULT,
) -> None:
    """Turn `file` into the add-cow file of an image of `size` bytes; durable on return.

    Without a backing file the disk is all zeroes, whatever the image holds.

    Raises:   RequestError: the size, cluster size or a name cannot be; nothing was written.
    Fails to: the file is no add-cow file.
    """
    bits = cluster_size.bit_length() - 1
    in_range = headers.CLUSTER_BITS_MIN <= bits <= headers.CLUSTER_BITS_MAX
    if not in_range or cluster_size != 1 << bits:
        raise RequestError(f"Cluster size {cluster_size} must be a power of two between 4k and 2M")
    if size < 0 or size % SECTOR_SIZE:
        raise RequestError(f"Image size {size} must be a positive multiple of 512 bytes")
    if (backing_filename is None) != (backing_format is None):
        raise RequestError("A backing file and its format are given together, for example 'raw' or 'qcow2'")
    header = headers.new_header(bits, image_filename, backing_filename, backing_format)
    await in_thread(_write, file, headers.pack(header), header.bitmap_length(size))


def _write(file: ProtocolNode, header: bytes, bitmap_length: int) -> None:
    if file.size:  # a block device, or a file used before: whatever it was, it is that no longer
        _clear(file, len(header) + bitmap_length)
    if file.size < len(header) + bitmap_length:
        file.truncate_blocking(len(header) + bitmap_length)
    file.write_blocking(SECTOR_SIZE, header[SECTOR_SIZE:])
    file.sync_blocking()
    file.write_blocking(0, header[:SECTOR_SIZE])
    file.sync_blocking()


def _clear(file: ProtocolNode, length: int) -> None:
    for offset in range(0, min(length, file.size), _CHUNK):
        file.write_blocking(offset, zeroes(min(_CHUNK, length - offset)))
        if not offset:
            file.sync_blocking()
