"""null-co and null-aio: a disk that takes every write and forgets it, for measurements of what stands above.

Reads find zeroes; with `reads_zeroes` the map says so, too. `latency_s`: how long each request takes.
"""

import asyncio
import threading

from blockd.block.node import Buffer, ProtocolNode
from blockd.block.segments import zeroes
from blockd.errors import RequestError
from blockd.extents import Extent, Kind
from blockd.units import GIB, MIB

SIZE_DEFAULT = 1 * GIB
# What is read at once without waiting, as of other files.
NOWAIT_LENGTH_MAX = 1 * MIB


class NullNode(ProtocolNode):
    """A disk of `size` bytes and nothing in it."""

    driver = "null-co"

    def __init__(
        self,
        size: int,
        *,
        node_name: str,
        read_only: bool,
        latency_s: float = 0.0,
        reads_zeroes: bool = False,
    ) -> None:
        super().__init__(node_name, f"{self.driver}://", size, read_only=read_only)
        self._latency_s = latency_s
        # Set when the node closes: nobody waits any longer then.
        self._closed = threading.Event()
        self._kind = Kind.ZERO if reads_zeroes else Kind.DATA

    async def _wait(self) -> None:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    def _wait_blocking(self) -> None:
        if self._latency_s:
            self._closed.wait(self._latency_s)

    # -- reading ------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return None if self._latency_s or length > NOWAIT_LENGTH_MAX else zeroes(length)

    async def read(self, offset: int, length: int) -> Buffer:
        await self._wait()
        return zeroes(length)

    def readinto_blocking(self, offset: int, buffer: memoryview) -> None:
        self._wait_blocking()
        buffer[:] = zeroes(len(buffer))

    async def map(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, self._kind)]

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        return self._kind

    # -- writing ------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return not (self.read_only or self._latency_s)

    async def write(self, offset: int, data: Buffer) -> None:
        self._require_writable()
        await self._wait()

    def write_blocking(self, offset: int, data: Buffer) -> None:
        self._require_writable()
        self._wait_blocking()

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        await self.write(offset, b"")

    def punch_hole_blocking(self, offset: int, length: int) -> None:
        self.write_blocking(offset, b"")

    def start_writeback_blocking(self, offset: int, length: int) -> None:
        """There is nothing to write."""

    async def flush(self) -> None:
        await self._wait()

    def sync_blocking(self) -> None:
        self._require_writable()
        self._wait_blocking()

    async def resize(self, size: int) -> None:
        raise RequestError("Image format driver does not support resize")

    def truncate_blocking(self, size: int) -> None:
        raise RequestError("Image format driver does not support resize")

    async def reopen(self, *, read_only: bool) -> None:
        self.read_only = read_only

    async def close(self) -> None:
        self._closed.set()


class NullAioNode(NullNode):
    """The same under QEMU's other name for it."""

    driver = "null-aio"
