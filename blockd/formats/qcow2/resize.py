"""Another size for a disk. One that grows reads as zeroes behind its old end, whatever the backing has there.

A disk that shrinks is smaller as soon as the header says so, durably; then what is behind its end is freed.
So after a crash the disk is whole, in one size or the other, and at worst keeps space that it does not need.
"""

import logging
from typing import TYPE_CHECKING

from blockd.aio import uninterrupted
from blockd.errors import RequestError, StorageError
from blockd.extents import Kind
from blockd.units import SECTOR_SIZE, align_up

if TYPE_CHECKING:
    from blockd.formats.qcow2.image import Qcow2Image


log = logging.getLogger(__name__)


async def resize(image: "Qcow2Image", size: int) -> None:
    """Give the disk another size, durably.

    Raises:   RequestError: not in sectors, or larger than the format allows.
    Fails to: the size is as before.
    """
    if size % SECTOR_SIZE:
        raise RequestError(f"The new size must be a multiple of {SECTOR_SIZE}")
    image.metadata.require_resizable()
    if size < image.size:
        await _shrink(image, size)
    else:
        await _grow(image, size)


async def _grow(image: "Qcow2Image", size: int) -> None:
    """Make the disk larger: room in the L1 table, zeroes over the backing, then the size."""
    old_size = image.size
    await image.metadata.grow_l1(size)
    cluster_end = min(size, align_up(old_size, image.cluster_size))
    if old_size < cluster_end:
        await image.write(old_size, bytes(cluster_end - old_size))
    if cluster_end < (backed_end := image.backed_end(size)):
        await image.write_zeroes(cluster_end, backed_end - cluster_end)
    await _forget_data(image, cluster_end, size)
    await _set_size(image, size)


@uninterrupted
async def _shrink(image: "Qcow2Image", size: int) -> None:
    """Make the disk smaller: the size, then what was behind it is let go."""
    old_size = image.size
    await _set_size(image, size)
    try:
        await image.forget(size, old_size)
        await image.flush()
        await image.trim()
    except StorageError as error:
        log.warning("'%s' takes more space than it needs: %s", image.filename, error.message)


@uninterrupted
async def _set_size(image: "Qcow2Image", size: int) -> None:
    await image.metadata.set_size(size)
    image.size = size


async def _forget_data(image: "Qcow2Image", offset: int, end: int) -> None:
    """Let nothing show that was stored there: others leave the map behind a disk's end as it is."""
    while offset < end:
        for extent in await image.map(offset, end - offset):
            if extent.kind is Kind.DATA:
                await image.write_zeroes(extent.offset, extent.length)
            offset = extent.end
