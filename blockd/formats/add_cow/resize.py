"""Growing a disk: what lies behind its old end must read as zeroes, whatever the backing has there."""

from typing import TYPE_CHECKING

from blockd.aio import uninterrupted
from blockd.errors import RequestError
from blockd.formats.add_cow.bitmap import ABSENT
from blockd.units import SECTOR_SIZE, align_down, align_up

if TYPE_CHECKING:
    from blockd.formats.add_cow.image import AddCowImage


async def grow(overlay: "AddCowImage", size: int) -> None:
    """Make the disk larger: room in the bitmap, bits over the backing, then the image's length; durable.

    What is new in the image is a hole, so a set bit makes it zeroes. Bits that are set behind the end of the
    disk, after a crash or an error before its new length is there, do no harm: it can only grow.

    Raises:   RequestError: smaller than now, or not in sectors.
    Fails to: the size is as before.
    """
    if size % SECTOR_SIZE:
        raise RequestError(f"The new size must be a multiple of {SECTOR_SIZE}")
    if size < overlay.size:
        raise RequestError("Shrinking an add-cow image is not supported")
    if not overlay.is_complete:
        await overlay.metadata.grow_bitmap(size)
        await _cover_backing(overlay, size)
    await _set_size(overlay, size)


@uninterrupted
async def _set_size(overlay: "AddCowImage", size: int) -> None:
    await overlay.metadata.set_size(size)
    overlay.size = overlay.image.size = size


async def _cover_backing(overlay: "AddCowImage", size: int) -> None:
    """Bring the clusters into the image in which the backing has anything behind the old end."""
    backed_end = overlay.backed_end(size)
    if backed_end <= overlay.size:
        return
    last = align_down(overlay.size, overlay.cluster_size)
    if last < overlay.size:
        state, _ = await overlay.run(last, overlay.size - last)
        if state == ABSENT:
            await overlay.write(last, await overlay.read(last, overlay.size - last))
    first = align_up(overlay.size, overlay.cluster_size)
    end = align_up(backed_end, overlay.cluster_size)
    if first < end:
        await overlay.metadata.bitmap.set(first // overlay.cluster_size, end // overlay.cluster_size)
