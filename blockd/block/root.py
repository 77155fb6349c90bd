"""What guests hold on to: a disk whose top node can be replaced while they are connected.

A guest request takes the fast path on `node`, or goes through `request()` when it may have to
wait. `drained()` holds new requests back and waits for those in flight, so that the graph under
the root can be changed without the guest noticing more than a short pause.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from blockd.block.accounting import DiskStats
from blockd.block.lost_writes import LostWrites
from blockd.block.node import BlockNode, Buffer


class Root:
    """One disk as its users see it."""

    def __init__(self, node: BlockNode) -> None:
        # The node for the fast path; while drained, one that always says it would have to wait.
        self.node = node
        self._top = node
        # Of the disk, whatever serves it.
        self.stats = DiskStats()
        self.lost_writes = LostWrites()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()
        self._drain_lock = asyncio.Lock()

    @property
    def top(self) -> BlockNode:
        """The node that serves the disk, drained or not."""
        return self._top

    @property
    def size(self) -> int:
        return self._top.size

    def replace(self, node: BlockNode) -> None:
        """Put another top node in place.

        Needs:    inside `drained()`, or before the first request.
        """
        self._top = node
        if self._open.is_set():
            self.node = node

    def request(self) -> "_Request":
        """Hold the top node for one request that may wait: `async with root.request() as node`.

        Waits first while the root is drained.
        """
        return _Request(self)

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """Keep requests out: on entry none is in flight, until exit none starts.

        Cancel:   requests go on as before.
        """
        async with self._drain_lock:
            self._open.clear()
            self.node = _Held(self._top)
            try:
                while self._in_flight:
                    self._idle.clear()
                    await self._idle.wait()
                yield
            finally:
                self.node = self._top
                self._open.set()


class _Request:
    """One request in flight. A class, for a generator would cost several times as much."""

    __slots__ = ("_root",)

    def __init__(self, root: Root) -> None:
        self._root = root

    async def __aenter__(self) -> BlockNode:
        root = self._root
        while not root._open.is_set():
            await root._open.wait()
        root._in_flight += 1
        return root._top

    async def __aexit__(self, *exception: object) -> None:
        root = self._root
        root._in_flight -= 1
        if not root._in_flight:
            root._idle.set()


class _Held(BlockNode):
    """Stands in for a drained node: never answers at once, so every request goes through `request()`."""

    driver = "held"

    def __init__(self, held: BlockNode) -> None:
        super().__init__(held.node_name, held.filename, held.size, read_only=held.read_only)

    async def read(self, offset: int, length: int) -> Buffer:
        raise AssertionError("a drained node was used outside Root.request()")

    async def write(self, offset: int, data: Buffer) -> None:
        raise AssertionError("a drained node was used outside Root.request()")

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        raise AssertionError("a drained node was used outside Root.request()")

    async def discard(self, offset: int, length: int) -> None:
        raise AssertionError("a drained node was used outside Root.request()")

    async def flush(self) -> None:
        raise AssertionError("a drained node was used outside Root.request()")

    async def close(self) -> None:
        raise AssertionError("a drained node was used outside Root.request()")
