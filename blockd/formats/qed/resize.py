"""Growing a disk: what lies behind its old end must read as zeroes, whatever the backing has there."""

from typing import TYPE_CHECKING

from blockd.aio import uninterrupted
from blockd.errors import RequestError
from blockd.units import SECTOR_SIZE, align_up

if TYPE_CHECKING:
    from blockd.formats.qed.image import QedImage


async def grow(image: "QedImage", size: int) -> None:
    """Make the disk larger: zeroes over the backing, then the size; durable.

    Raises:   RequestError: smaller than now, not in sectors, or larger than the tables can map.
    Fails to: the size is as before.
    """
    if size % SECTOR_SIZE:
        raise RequestError(f"The new size must be a multiple of {SECTOR_SIZE}")
    if size < image.size:
        raise RequestError("Shrinking a QED image is not supported")
    image.metadata.require_size(size)
    old_size = image.size
    await image.metadata.grow_l1(size)
    cluster_end = min(size, align_up(old_size, image.cluster_size))
    if old_size < cluster_end:
        await image.write_zeroes(old_size, cluster_end - old_size)
    if cluster_end < (backed_end := image.backed_end(size)):
        await image.write_zeroes(cluster_end, backed_end - cluster_end)
    await _set_size(image, size)


@uninterrupted
async def _set_size(image: "QedImage", size: int) -> None:
    await image.metadata.set_size(size)
    image.size = size
