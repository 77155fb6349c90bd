"""Make a new raw image: a file of the right length that holds nothing but a hole."""

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.errors import RequestError
from blockd.units import SECTOR_SIZE


async def create(
    file: ProtocolNode,
    size: int,
    *,
    backing_filename: str | None = None,
    backing_format: str | None = None,
) -> None:
    """Give `file`, which is empty, its length; durable on return.

    Raises:   RequestError: the size or a backing file cannot be; nothing was changed.
    """
    if backing_filename is not None or backing_format is not None:
        raise RequestError("A raw image cannot have a backing file; use qcow2 for an overlay")
    if size < 0 or size % SECTOR_SIZE:
        raise RequestError(f"Image size {size} must be a positive multiple of 512 bytes")
    await in_thread(_set_length, file, size)


def _set_length(file: ProtocolNode, size: int) -> None:
    file.truncate_blocking(size)
    file.sync_blocking()
