"""Nodes that misbehave on purpose: a source that does not answer yet, a disk that is full or broken."""

import asyncio
import errno
import random
from collections.abc import Callable

from blockd.block.node import BlockNode, Buffer, FilterNode, Segment
from blockd.errors import StorageError
from tests.inline_threads import steps
from tests.recording import Change, RecordingFile, Sync, Write


class HeldNode(FilterNode):
    """A read-only source whose reads wait while it is held; `reached` tells that one does."""

    driver = "held"

    def __init__(self, child: BlockNode) -> None:
        super().__init__(child, node_name="#held")
        self.read_only = True
        self._open = asyncio.Event()
        self._open.set()
        self.reached = asyncio.Event()
        self.read_count = 0
        self.error: StorageError | None = None

    def hold(self) -> None:
        self._open.clear()
        self.reached.clear()

    def hold_no_more(self) -> asyncio.Event:
        """Let only those go on waiting that do, until what is returned is set."""
        held, self._open = self._open, asyncio.Event()
        self._open.set()
        return held

    def release(self) -> None:
        self._open.set()

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        return [Segment(length, self, offset)]

    async def read(self, offset: int, length: int) -> Buffer:
        self.read_count += 1
        await asyncio.sleep(0)
        if not self._open.is_set():
            self.reached.set()
            await self._open.wait()
        if self.error is not None:
            raise self.error
        return await self.child.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        raise AssertionError("a source was written")

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        raise AssertionError("a source was written")

    async def discard(self, offset: int, length: int) -> None:
        raise AssertionError("a source was written")

    async def flush(self) -> None:
        """There is nothing to flush."""


class LateNode(FilterNode):
    """A source that answers after some turns of the loop, a random number of them."""

    driver = "late"

    def __init__(self, child: BlockNode, rng: random.Random, step_count_max: int) -> None:
        super().__init__(child, node_name="#late")
        self._rng = rng
        self._step_count_max = step_count_max

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        return [Segment(length, self, offset)]

    async def read(self, offset: int, length: int) -> Buffer:
        await steps(self._rng.randrange(self._step_count_max))
        return await self.child.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        raise AssertionError("a source was written")

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        raise AssertionError("a source was written")

    async def discard(self, offset: int, length: int) -> None:
        raise AssertionError("a source was written")


class FailingFile(RecordingFile):
    """A recorded file whose changes and syncs fail when `fails` says so."""

    def __init__(self, content: bytes = b"", name: str = "failing.qcow2") -> None:
        super().__init__(content, name)
        self.fails: Callable[[Change | Sync], int] = lambda _: 0
        self.change_count = 0
        self.fault_count = 0

    def fill_up(self, size: int) -> None:
        """The disk is full: the file cannot grow past `size`."""

        def fails(change: Change | Sync) -> int:
            grows = isinstance(change, Write) and change.offset + len(change.data) > size
            return errno.ENOSPC if grows else 0

        self.fails = fails

    def fail_at(self, number: int, code: int = errno.EIO) -> None:
        """Fail the change number `number` from now on, counted from 1, and none after it."""
        first = self.change_count
        self.fails = lambda _: code if self.change_count == first + number else 0

    def work(self) -> None:
        """Nothing fails any more."""
        self.fails = lambda _: 0

    def before_change(self, change: Change | Sync) -> None:
        self.change_count += 1
        code = self.fails(change)
        if code:
            self.fault_count += 1
            raise StorageError(f"Could not change '{self.filename}': a fault made by a test", errno=code)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if self.fails(Write(offset, bytes(data))):
            return False  # the awaitable write meets the same fault and reports it
        return super().write_nowait(offset, data)
