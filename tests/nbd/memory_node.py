"""A disk in memory: the simplest node there is, with handles for tests to hold and fail it."""

import asyncio

from blockd.block.node import BlockNode, Buffer
from blockd.errors import StorageError
from blockd.extents import Extent, Kind


class MemoryNode(BlockNode):
    """Keeps its bytes in `data`; clusters never written, or zeroed, are holes.

    `gate` is what every awaitable operation waits for, `nowait` whether the fast path answers,
    `error` what every operation fails with. `log` lists the operations that were begun.
    """

    driver = "memory"

    def __init__(self, size: int, *, cluster_size: int = 4096, read_only: bool = False) -> None:
        super().__init__("memory", "memory", size, read_only=read_only)
        self.cluster_size = cluster_size
        self.data = bytearray(size)
        self.holes = set(range((size + cluster_size - 1) // cluster_size))
        self.nowait = True
        self.error: StorageError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.log: list[str] = []
        self.waiting = 0
        self.waiting_most = 0
        self.changed = asyncio.Condition()

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        if self.error:
            raise self.error
        return self.data[offset : offset + length] if self.nowait else None

    async def read(self, offset: int, length: int) -> Buffer:
        await self._enter("read")
        return self.data[offset : offset + length]

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        kinds = {self._kind(cluster) for cluster in self._clusters(offset, length)}
        return kinds.pop() if len(kinds) == 1 and self.nowait else None

    async def map(self, offset: int, length: int) -> list[Extent]:
        await self._enter("map")
        end = offset + length
        kind = self._kind(offset // self.cluster_size)
        position = offset
        while position < end and self._kind(position // self.cluster_size) is kind:
            position = (position // self.cluster_size + 1) * self.cluster_size
        return [Extent(offset, min(position, end) - offset, kind)]

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if self.error:
            raise self.error
        if self.nowait:
            self._store(offset, data)
        return self.nowait

    async def write(self, offset: int, data: Buffer) -> None:
        await self._enter("write")
        self._store(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        await self._enter(f"write_zeroes unmap={unmap}")
        self._zero(offset, length, is_hole=unmap)

    async def discard(self, offset: int, length: int) -> None:
        await self._enter("discard")
        self._zero(offset, length, is_hole=True)

    async def flush(self) -> None:
        await self._enter("flush")

    async def resize(self, size: int) -> None:
        self.data[:] = self.data[:size].ljust(size, b"\0")
        self.size = size

    async def close(self) -> None:
        self.log.append("close")

    async def wait_for_waiting(self, count: int) -> None:
        """Return when `count` operations wait at the gate."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.waiting >= count)

    async def _enter(self, operation: str) -> None:
        self.log.append(operation)
        self.waiting += 1
        self.waiting_most = max(self.waiting_most, self.waiting)
        try:
            async with self.changed:
                self.changed.notify_all()
            await self.gate.wait()
        finally:
            self.waiting -= 1
        if self.error:
            raise self.error

    def _kind(self, cluster: int) -> Kind:
        return Kind.ZERO if cluster in self.holes else Kind.DATA

    def _clusters(self, offset: int, length: int) -> range:
        return range(offset // self.cluster_size, (offset + length - 1) // self.cluster_size + 1)

    def _store(self, offset: int, data: Buffer) -> None:
        assert not self.read_only
        self.data[offset : offset + len(data)] = data
        self.holes.difference_update(self._clusters(offset, len(data)))

    def _zero(self, offset: int, length: int, *, is_hole: bool) -> None:
        self._store(offset, bytes(length))
        end = offset + length
        if is_hole:
            size = self.cluster_size
            self.holes.update(range(-(-offset // size), self.size if end == self.size else end // size))
