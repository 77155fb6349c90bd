"""A guest's disk at the other end of an NBD connection."""

from blockd.protocols.nbd_client import NbdClient


class NbdDisk:
    """An export as the guests of tests/guest.py use it."""

    def __init__(self, client: NbdClient) -> None:
        self.client = client

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(await self.client.read(offset, length))

    async def write(self, offset: int, data: bytes) -> None:
        await self.client.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self.client.write_zeroes(offset, length, no_hole=not unmap)

    async def discard(self, offset: int, length: int) -> None:
        await self.client.trim(offset, length)

    async def flush(self) -> None:
        await self.client.flush()
