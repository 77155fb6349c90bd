"""faults: a file that fails or is slow when its rules say so, for tests of what stands on it.

It is put between a format and its file and is a protocol node itself, so that a format does not know.
QEMU calls it blkdebug, and so may clients. Nothing is answered at once here: requests that need not
wait would pass by the events that rules wait for.
"""

import threading
from collections.abc import Mapping

from blockd.aio import in_thread
from blockd.block.file_events import FileEvent
from blockd.block.node import BlockNode, Buffer, ProtocolNode
from blockd.errors import StorageError
from blockd.extents import Extent
from blockd.filters.fault_rules import FaultRules, IoType

_ACTIONS = {
    IoType.READ: "read",
    IoType.WRITE: "write",
    IoType.WRITE_ZEROES: "write zeroes to",
    IoType.DISCARD: "punch a hole in",
    IoType.FLUSH: "sync",
    IoType.BLOCK_STATUS: "map",
}


class FaultsNode(ProtocolNode):
    """Injects the faults of `rules` into requests to `image`."""

    driver = "faults"

    def __init__(self, image: ProtocolNode, rules: FaultRules, *, node_name: str) -> None:
        super().__init__(node_name, image.filename, image.size, read_only=image.read_only)
        self.image = image
        self.rules = rules
        # Set when the node closes: nobody waits any longer for delays then.
        self._closed = threading.Event()

    def children(self) -> Mapping[str, BlockNode]:
        return {"file": self.image}

    def announce(self, event: FileEvent) -> None:
        self.rules.announce(event)

    def _meet_fault(self, io_type: IoType, offset: int = 0, length: int = 0) -> None:
        fault = self.rules.take(io_type, offset, length)
        if fault.delay_s:
            self._closed.wait(fault.delay_s)
        if fault.errno:
            raise StorageError.from_os(OSError(fault.errno, ""), _ACTIONS[io_type], self.filename)

    # -- reading ------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> Buffer:
        buffer = bytearray(length)
        await in_thread(self.readinto_blocking, offset, memoryview(buffer))
        return buffer

    def readinto_blocking(self, offset: int, buffer: memoryview) -> None:
        self._meet_fault(IoType.READ, offset, len(buffer))
        self.image.readinto_blocking(offset, buffer)

    async def map(self, offset: int, length: int) -> list[Extent]:
        await in_thread(self._meet_fault, IoType.BLOCK_STATUS, offset, length)
        return await self.image.map(offset, length)

    # -- writing ------------------------------------------------------------------------------

    async def write(self, offset: int, data: Buffer) -> None:
        await in_thread(self.write_blocking, offset, data)

    def write_blocking(self, offset: int, data: Buffer) -> None:
        self._before_write(offset, len(data))
        self.image.write_blocking(offset, data)
        self._after_write()

    def write_cold_blocking(self, offset: int, data: Buffer) -> None:
        self._before_write(offset, len(data))
        self.image.write_cold_blocking(offset, data)
        self._after_write()

    def _before_write(self, offset: int, length: int) -> None:
        self._require_writable()
        self.announce(FileEvent.PWRITEV)
        self._meet_fault(IoType.WRITE, offset, length)

    def _after_write(self) -> None:
        self.size = self.image.size
        self.announce(FileEvent.PWRITEV_DONE)

    def start_writeback_blocking(self, offset: int, length: int) -> None:
        self.image.start_writeback_blocking(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._require_writable()
        self.announce(FileEvent.PWRITEV_ZERO)
        await in_thread(self._meet_fault, IoType.WRITE_ZEROES, offset, length)
        await self.image.write_zeroes(offset, length, unmap=unmap)
        self._after_write()

    async def discard(self, offset: int, length: int) -> None:
        self._require_writable()
        await in_thread(self._meet_fault, IoType.DISCARD, offset, length)
        await self.image.discard(offset, length)

    def punch_hole_blocking(self, offset: int, length: int) -> None:
        self._require_writable()
        self._meet_fault(IoType.DISCARD, offset, length)
        self.image.punch_hole_blocking(offset, length)

    async def flush(self) -> None:
        if not self.read_only:
            await in_thread(self.sync_blocking)

    def require_unchanged_blocking(self) -> None:
        self.image.require_unchanged_blocking()

    def sync_blocking(self) -> None:
        self._require_writable()
        self.announce(FileEvent.FLUSH_TO_DISK)
        try:
            self._meet_fault(IoType.FLUSH)
            self.image.sync_blocking()
        except StorageError as error:
            self.failed = error
            raise

    async def resize(self, size: int) -> None:
        await in_thread(self.truncate_blocking, size)

    def truncate_blocking(self, size: int) -> None:
        self._require_writable()
        self.image.truncate_blocking(size)
        self.size = self.image.size

    async def reopen(self, *, read_only: bool) -> None:
        if self.failed is not None:
            raise self.failed
        await self.image.reopen(read_only=read_only)
        self.read_only, self.size = self.image.read_only, self.image.size

    async def close(self) -> None:
        self._closed.set()
