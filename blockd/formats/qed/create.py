"""Make a new, empty QED image.

The first clusters are, in this order: the header, with the name of the backing file right behind its
fields, and the L1 table, a hole.

Order on disk: old content gone → durable → length, and the name past the first sector → durable → the
first sector → durable. Until that is there the file is no image, so a crash never leaves one that is half
made.

Source:   QED specification, "Header".
"""

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.errors import RequestError
from blockd.filenames import pack_recorded
from blockd.formats.qed import header as qed_header
from blockd.formats.qed.header import HEADER_LENGTH, Header
from blockd.units import SECTOR_SIZE

CLUSTER_SIZE_DEFAULT = 65536
TABLE_SIZE_DEFAULT = 4


async def create(
    file: ProtocolNode,
    size: int,
    *,
    backing_filename: str | None = None,
    backing_format: str | None = None,
    cluster_size: int = CLUSTER_SIZE_DEFAULT,
    table_size: int = TABLE_SIZE_DEFAULT,
) -> None:
    """Turn `file` into an empty image of `size` bytes; durable on return.

    Of the backing file's format the image records whether it is raw, nothing else.

    Raises:   RequestError: a size or the backing link cannot be; nothing was written.
    Fails to: the file is no QED image.
    """
    _check_sizes(size, cluster_size, table_size)
    name = _backing_name(backing_filename, backing_format)
    features = qed_header.FEATURE_BACKING_FILE if name else 0
    if name and backing_format == "raw":
        features |= qed_header.FEATURE_BACKING_RAW
    header = Header(
        cluster_size=cluster_size,
        table_size=table_size,
        header_size=1,
        l1_offset=cluster_size,
        size=size,
        features=features,
        backing_offset=HEADER_LENGTH if name else 0,
        backing_length=len(name),
    )
    await in_thread(_write_image, file, header, name)


def _check_sizes(size: int, cluster_size: int, table_size: int) -> None:
    if not qed_header.is_cluster_size(cluster_size):
        raise RequestError("QED cluster size must be within range [4096, 67108864] and power of 2")
    if not qed_header.is_table_size(table_size):
        raise RequestError("QED table size must be within range [1, 16] and power of 2")
    largest = qed_header.size_max(cluster_size, table_size)
    if size < 0 or size % SECTOR_SIZE or size > largest:
        raise RequestError(
            f"QED image size must be a multiple of {SECTOR_SIZE} and not more than {largest} bytes"
        )


def _backing_name(filename: str | None, backing_format: str | None) -> bytes:
    if filename is None and backing_format is None:
        return b""
    if not filename:
        raise RequestError("A backing format was given without a backing file")
    if not backing_format:
        raise RequestError(
            f"The backing file '{filename}' needs its format with it, for example 'qcow2' or 'raw'"
        )
    return pack_recorded(filename)


def _write_image(file: ProtocolNode, header: Header, name: bytes) -> None:
    if file.size:
        file.truncate_blocking(0)
        file.sync_blocking()
    file.truncate_blocking(header.l1_offset + header.table_length)
    content = (qed_header.pack(header) + name).ljust(SECTOR_SIZE, b"\0")
    if content[SECTOR_SIZE:]:
        file.write_blocking(SECTOR_SIZE, content[SECTOR_SIZE:])
    file.sync_blocking()
    file.write_blocking(0, content[:SECTOR_SIZE])
    file.sync_blocking()
