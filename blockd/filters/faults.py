"""faults: a file that fails or is slow when its rules say so, for tests of what stands on it.

It is put between a format and its file and is a protocol node itself, so that a format does not know.
QEMU calls it blkdebug, and so may clients. Nothing is answered at once here: requests that need not
wait would pass by the events that rules wait for.
"""

import threading
from collections.abc import Callable, Mapping

from blockd.aio import in_thread
from blockd.block.file_events import FileEvent
from blockd.block.node import BlockNode, Buffer, ProtocolNode
from blockd.block.permissions import EVERYTHING, Access, Permission
from blockd.errors import StorageError
from blockd.extents import Extent
from blockd.filters.fault_rules import FaultRules, IoType
from blockd.filters.request_limits import RequestLimits

_ACTIONS = {
    IoType.READ: "read",
    IoType.WRITE: "write",
    IoType.WRITE_ZEROES: "write zeroes to",
    IoType.DISCARD: "punch a hole in",
    IoType.FLUSH: "sync",
    IoType.BLOCK_STATUS: "map",
}
# What is announced around the reading of a block that is written in part.
_HEAD_EVENTS = FileEvent.PWRITEV_RMW_HEAD, FileEvent.PWRITEV_RMW_AFTER_HEAD
_TAIL_EVENTS = FileEvent.PWRITEV_RMW_TAIL, FileEvent.PWRITEV_RMW_AFTER_TAIL
NO_LIMITS = RequestLimits()
NO_MORE_ACCESS = Access(Permission.NONE, EVERYTHING)


class FaultsNode(ProtocolNode):
    """Injects the faults of `rules` into requests to `image`."""

    driver = "faults"
    counts_requests = True

    def __init__(
        self,
        image: ProtocolNode,
        rules: FaultRules,
        *,
        node_name: str,
        limits: RequestLimits = NO_LIMITS,
        more_access: Access = NO_MORE_ACCESS,
    ) -> None:
        super().__init__(node_name, image.filename, image.size, read_only=image.read_only)
        self.image = image
        self.rules = rules
        self._limits = limits
        self.request_alignment, self.transfer_max = limits.align, limits.max_transfer
        self._more_access = more_access
        # Set when the node closes: nobody waits any longer for delays then.
        self._closed = threading.Event()

    def children(self) -> Mapping[str, BlockNode]:
        return {"image": self.image}

    def access_to(self, role: str, wanted: Access, *, read_only: bool) -> Access:
        return Access(wanted.need | self._more_access.need, wanted.allow & self._more_access.allow)

    def announce(self, event: FileEvent, count: int = 1) -> None:
        for _ in range(count):
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
        for start, end in self._limits.transfers(offset, len(buffer)):
            self._meet_fault(IoType.READ, start, end - start)
        self.image.readinto_blocking(offset, buffer)

    async def map(self, offset: int, length: int) -> list[Extent]:
        [(start, end)] = RequestLimits(self._limits.align).transfers(offset, length)
        await in_thread(self._meet_fault, IoType.BLOCK_STATUS, start, end - start)
        return await self.image.map(offset, length)

    # -- writing ------------------------------------------------------------------------------

    async def write(self, offset: int, data: Buffer) -> None:
        await in_thread(self.write_blocking, offset, data)

    def write_blocking(self, offset: int, data: Buffer) -> None:
        self._write(offset, data, self.image.write_blocking)

    def write_cold_blocking(self, offset: int, data: Buffer) -> None:
        self._write(offset, data, self.image.write_cold_blocking)

    def _write(self, offset: int, data: Buffer, write: Callable[[int, Buffer], None]) -> None:
        self._require_writable()
        self._read_partial_blocks(offset, len(data))
        self.announce(FileEvent.PWRITEV)
        self._write_pieces(offset, data, write)
        self._after_write()

    def _read_partial_blocks(self, offset: int, length: int) -> None:
        """Meet what a disk would meet that can write whole blocks only."""
        for start in self._limits.partial_blocks(offset, length):
            before, after = _HEAD_EVENTS if start < offset else _TAIL_EVENTS
            self.announce(before)
            self._meet_fault(IoType.READ, start, self._limits.align)
            self.announce(after)

    def _write_pieces(self, offset: int, data: Buffer, write: Callable[[int, Buffer], None]) -> None:
        view = memoryview(data)
        for start, end in self._limits.transfers(offset, len(view)):
            self._meet_fault(IoType.WRITE, start, end - start)
            position = max(start, offset)
            write(position, view[position - offset : end - offset])

    def _after_write(self) -> None:
        self.size = self.image.size
        self.announce(FileEvent.PWRITEV_DONE)

    def start_writeback_blocking(self, offset: int, length: int) -> None:
        self.image.start_writeback_blocking(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._require_writable()
        self.announce(FileEvent.PWRITEV_ZERO)
        start, end = self._limits.whole_zeroes(offset, length)
        if start == end:
            await in_thread(self._write_zeroes_as_data, offset, length)
        else:
            await in_thread(self._write_zeroes_as_data, offset, start - offset)
            for position, piece_end in self._limits.zeroes(start, end):
                await in_thread(self._meet_fault, IoType.WRITE_ZEROES, position, piece_end - position)
                await self.image.write_zeroes(position, piece_end - position, unmap=unmap)
            await in_thread(self._write_zeroes_as_data, end, offset + length - end)
        self._after_write()

    def _write_zeroes_as_data(self, offset: int, length: int) -> None:
        if length:
            self._read_partial_blocks(offset, length)
            self._write_pieces(offset, bytes(length), self.image.write_blocking)

    async def discard(self, offset: int, length: int) -> None:
        self._require_writable()
        for start, end in self._limits.discards(offset, length):
            await in_thread(self._meet_fault, IoType.DISCARD, start, end - start)
            await self.image.discard(start, end - start)

    def punch_hole_blocking(self, offset: int, length: int) -> None:
        self._require_writable()
        for start, end in self._limits.discards(offset, length):
            self._meet_fault(IoType.DISCARD, start, end - start)
            self.image.punch_hole_blocking(start, end - start)

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

    def allocate_blocking(self, offset: int, length: int) -> bool:
        self._require_writable()
        is_allocated = self.image.allocate_blocking(offset, length)
        self.size = self.image.size
        return is_allocated

    def trim_blocking(self, end: int) -> None:
        self._require_writable()
        self.image.trim_blocking(end)
        self.size = self.image.size

    async def reopen(self, *, read_only: bool) -> None:
        if self.failed is not None:
            raise self.failed
        self.read_only, self.size = read_only, self.image.size

    async def close(self) -> None:
        self._closed.set()


class BlkdebugNode(FaultsNode):
    """The same, added under the name that QEMU has for it."""

    driver = "blkdebug"
