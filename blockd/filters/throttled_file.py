"""throttle in front of a file: it is a file itself, so that a format may stand on it.

What a format does in threads waits for the limits there, while the event loop, which the group lives in, goes
on; so nothing of that may be called in the loop's own thread.
"""

import asyncio

from blockd.block.file_events import FileEvent
from blockd.block.node import BlockNode, Buffer, ProtocolNode
from blockd.errors import StorageError
from blockd.filters.throttle import Throttle
from blockd.filters.throttle_group import Direction, ThrottleGroup


class ThrottledFile(Throttle, ProtocolNode):
    """A file whose users are kept within the limits of a throttle group."""

    child: ProtocolNode

    def __init__(self, child: ProtocolNode, group: ThrottleGroup, *, node_name: str) -> None:
        super().__init__(child, group, node_name=node_name)
        self._loop = asyncio.get_running_loop()

    def stand_before(self, child: BlockNode) -> None:
        assert isinstance(child, ProtocolNode), "a file stands before a file"
        super().stand_before(child)
        self.failed = child.failed

    def _admit(self, direction: Direction, length: int) -> None:
        """Wait, in a thread, until a request may pass."""
        admitted = self.group.admit(self, direction, length)
        asyncio.run_coroutine_threadsafe(admitted, self._loop).result()

    def announce(self, event: FileEvent, count: int = 1) -> None:
        self.child.announce(event, count)

    async def disk_usage(self) -> int | None:
        return await self.child.disk_usage()

    # -- reading ------------------------------------------------------------------------------

    def readinto_blocking(self, offset: int, buffer: memoryview) -> None:
        self._admit(Direction.READ, len(buffer))
        self.child.readinto_blocking(offset, buffer)

    # -- writing ------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        is_written = super().write_nowait(offset, data)
        self.size = self.child.size
        return is_written

    async def write(self, offset: int, data: Buffer) -> None:
        await super().write(offset, data)
        self.size = self.child.size

    def write_blocking(self, offset: int, data: Buffer) -> None:
        self._admit(Direction.WRITE, len(data))
        self.child.write_blocking(offset, data)
        self.size = self.child.size

    def start_writeback_blocking(self, offset: int, length: int) -> None:
        self.child.start_writeback_blocking(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        await super().write_zeroes(offset, length, unmap=unmap)
        self.size = self.child.size

    def write_zeroes_blocking(self, offset: int, length: int) -> None:
        self._admit(Direction.WRITE, length)
        self.child.write_zeroes_blocking(offset, length)
        self.size = self.child.size

    def allocate_blocking(self, offset: int, length: int) -> bool:
        is_allocated = self.child.allocate_blocking(offset, length)
        self.size = self.child.size
        return is_allocated

    def punch_hole_blocking(self, offset: int, length: int) -> None:
        self._admit(Direction.WRITE, length)
        self.child.punch_hole_blocking(offset, length)

    def require_unchanged_blocking(self) -> None:
        self.child.require_unchanged_blocking()

    def sync_blocking(self) -> None:
        try:
            self.child.sync_blocking()
        except StorageError as error:
            self.failed = error
            raise

    async def flush(self) -> None:
        try:
            await super().flush()
        except StorageError as error:
            self.failed = error
            raise

    async def resize(self, size: int) -> None:
        await super().resize(size)
        self.size = self.child.size

    def truncate_blocking(self, size: int) -> None:
        self.child.truncate_blocking(size)
        self.size = self.child.size

    def trim_blocking(self, end: int) -> None:
        self.child.trim_blocking(end)
        self.size = self.child.size

    async def reopen(self, *, read_only: bool) -> None:
        self.read_only, self.size = read_only, self.child.size
