"""Make a new raw image: a file of the right length, a hole or with its space allocated."""

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.errors import RequestError
from blockd.units import MIB, SECTOR_SIZE

PREALLOCATION_MODES = ("off", "falloc", "full")

# Zeroes written at a time, and what one thread hop writes, so that it can be cancelled.
_CHUNK = 1 * MIB
_HOP_SIZE = 64 * MIB


async def create(
    file: ProtocolNode,
    size: int,
    *,
    backing_filename: str | None = None,
    backing_format: str | None = None,
    preallocation: str = "off",
) -> None:
    """Give `file`, which is empty, its length; durable on return.

    Raises:   RequestError: the size, a backing file or the preallocation cannot be; nothing was changed.
    Fails to: the file is of any length.
    """
    if backing_filename is not None or backing_format is not None:
        raise RequestError("A raw image cannot have a backing file; use qcow2 for an overlay")
    if size < 0 or size % SECTOR_SIZE:
        raise RequestError(f"Image size {size} must be a positive multiple of 512 bytes")
    if preallocation not in PREALLOCATION_MODES:
        raise RequestError(f"Unsupported preallocation mode '{preallocation}'")
    if preallocation == "full":
        for offset in range(0, size, _HOP_SIZE):
            await in_thread(_write_zeroes, file, offset, min(_HOP_SIZE, size - offset))
    elif preallocation == "falloc" and size:
        await in_thread(_allocate, file, size)
    await in_thread(_set_length, file, size)


def _write_zeroes(file: ProtocolNode, offset: int, length: int) -> None:
    for start in range(offset, offset + length, _CHUNK):
        file.write_blocking(start, bytes(min(_CHUNK, offset + length - start)))


def _allocate(file: ProtocolNode, size: int) -> None:
    if not file.allocate_blocking(0, size):
        file.write_zeroes_blocking(0, size)


def _set_length(file: ProtocolNode, size: int) -> None:
    file.truncate_blocking(size)
    file.sync_blocking()
