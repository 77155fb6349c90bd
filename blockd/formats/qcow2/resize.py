"""Growing a disk: what lies behind its old end must read as zeroes, whatever the backing has there."""

from typing import TYPE_CHECKING

from blockd.errors import RequestError
from blockd.extents import Kind
from blockd.units import SECTOR_SIZE, align_up

if TYPE_CHECKING:
    from blockd.formats.qcow2.image import Qcow2Image


async def grow(image: "Qcow2Image", size: int) -> None:
    """Make the disk larger: room in the L1 table, zeroes over the backing, then the size; durable.

    Raises:   RequestError: smaller than now, not in sectors, or larger than the format allows.
    Fails to: the size is as before.
    """
    if size % SECTOR_SIZE:
        raise RequestError(f"The new size must be a multiple of {SECTOR_SIZE}")
    if size < image.size:
        raise RequestError("Shrinking a qcow2 image is not supported")
    old_size = image.size
    await image.metadata.grow_l1(size)
    cluster_end = min(size, align_up(old_size, image.cluster_size))
    if old_size < cluster_end:
        await image.write(old_size, bytes(cluster_end - old_size))
    if image.backing is not None and cluster_end < min(size, image.backing.size):
        await image.write_zeroes(cluster_end, min(size, image.backing.size) - cluster_end)
    await _forget_data(image, cluster_end, size)
    await image.metadata.set_size(size)
    image.size = size


async def _forget_data(image: "Qcow2Image", offset: int, end: int) -> None:
    """Let nothing show that was stored there: others leave the map behind a disk's end as it is."""
    while offset < end:
        for extent in await image.map(offset, end - offset):
            if extent.kind is Kind.DATA:
                await image.write_zeroes(extent.offset, extent.length)
            offset = extent.end
