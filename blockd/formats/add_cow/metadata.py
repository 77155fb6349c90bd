"""The header and the bitmap of one open add-cow file, changed together with the image they speak of."""

import asyncio

from blockd.aio import Coalesced, in_thread, uninterrupted
from blockd.block.node import ProtocolNode
from blockd.errors import ImageError
from blockd.formats.add_cow import checkpoint
from blockd.formats.add_cow import header as headers
from blockd.formats.add_cow.bitmap import Bitmap
from blockd.formats.add_cow.header import Header


class Metadata:
    """What an add-cow file says about the image in the file `image`.

    Locks:    `lock` is held while metadata goes to the disk, and never across guest data I/O.
    """

    def __init__(self, file: ProtocolNode, header: Header, image: ProtocolNode) -> None:
        self.file = file
        self.image = image
        self.header = header
        self.bitmap = Bitmap(file, header.size)
        self.lock = asyncio.Lock()
        # Make everything that was written before the call durable, bits included.
        self.flush = Coalesced(self._flush)

    @classmethod
    def checked(cls, file: ProtocolNode, header: Header, image: ProtocolNode, size: int) -> "Metadata":
        """The metadata of a disk of `size` bytes.

        Raises:   ImageError: the bitmap is too short for such a disk.
        """
        cluster_count = -(-size >> header.cluster_bits)
        needed = header.size + -(-cluster_count // 8)
        if file.size < needed and not header.is_all_allocated:
            raise ImageError(
                f"'{file.filename}': the bitmap ends at {file.size}, before the {needed} bytes that the "
                f"image '{image.filename}' of {size} bytes needs"
            )
        return cls(file, header, image)

    # -- checkpoints --------------------------------------------------------------------------

    async def relieve(self) -> None:
        """Make a checkpoint when too much waits for one; call before adding to what waits."""
        if self.bitmap.cache.is_under_pressure:
            await self.flush()

    async def _flush(self) -> None:
        async with self.lock:
            await self.checkpoint_locked()

    @uninterrupted
    async def checkpoint_locked(self) -> None:
        """Write all changes in order.

        Fails to: nothing is lost in memory; the next checkpoint writes it again.
        """
        if self.header.is_all_allocated:
            await in_thread(checkpoint.write_checkpoint, self.image, self.file, [])
            return
        pages = self.bitmap.take_changes()
        try:
            await in_thread(checkpoint.write_checkpoint, self.image, self.file, pages)
        except BaseException:
            self.bitmap.changes_failed(pages)
            raise
        self.bitmap.changes_written(pages)

    # -- changing the header ------------------------------------------------------------------

    @uninterrupted
    async def change_backing(self, filename: str | None, backing_format: str | None) -> None:
        """Make everything durable, then record another backing file, or that all is in the image, durably."""
        async with self.lock:
            await self.checkpoint_locked()
            header = headers.with_backing(self.header, filename, backing_format)
            current = bytes(await self.file.read(0, header.size))
            if header.backing is not None:
                current = await in_thread(checkpoint.write_name, self.file, header.backing, current)
            await in_thread(checkpoint.write_header, self.file, header, current)
            self.header = header

    async def grow_bitmap(self, size: int) -> None:
        """Have bits for a disk of `size` bytes, durably."""
        async with self.lock:
            needed = self.header.size + self.header.bitmap_length(size)
            await in_thread(checkpoint.grow_bitmap, self.file, needed)

    async def set_size(self, size: int) -> None:
        """Make the image larger, durably."""
        async with self.lock:
            await self.checkpoint_locked()
            await in_thread(checkpoint.set_length, self.image, size)
