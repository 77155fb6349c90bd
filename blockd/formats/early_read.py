"""Reads of metadata while an image is opened."""

from blockd.block.node import Buffer, ProtocolNode


async def read_early(file: ProtocolNode, offset: int, length: int) -> Buffer:
    """Read what is most often in the page cache, beside what was written or read a moment ago.

    No thread is asked where it is there; many disks that come at once need few of them.
    """
    data = file.read_nowait(offset, length)
    return await file.read(offset, length) if data is None else data
