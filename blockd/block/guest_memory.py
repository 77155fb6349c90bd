"""One budget for the bytes that guests' requests make the daemon hold.

    shares   half of it: each connection has a share of its own, which nobody else can use up
    common   the rest: what requests hold beyond shares, staged writes, copies for reads, merges

Whoever takes of it does so before the memory is there. What can do without (a copy for a read: the guest
reads from below) does not wait. Requests that have no room queue up, and the first in the queue is the next
that gets of what is common, so neither small nor large ones starve. Two things go on though there is no room,
for others may wait for them: one merge, and one request, of all in the daemon.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from blockd.units import MIB

MEMORY_MAX = 256 * MIB


class GuestMemory:
    """Counts bytes; used by the event loop alone."""

    def __init__(self, limit: int = MEMORY_MAX) -> None:
        self.limit = limit
        self.shares = limit // 2
        # Of what is common; below zero while something goes on without room.
        self.free = limit - self.shares
        self._of_requests = 0
        # Who waits for something common, in turn, and is called when it may be there.
        self._queue: dict[Callable[[], None], None] = {}
        self._merge_count = 0
        self._turn = asyncio.Lock()
        self._is_freed = asyncio.Event()

    @property
    def spare(self) -> int:
        """What is common, free, and not waited for."""
        return 0 if self._queue else max(0, self.free)

    def reserve(self, length: int) -> None:
        """Take `length` bytes, whether they are free or not."""
        self.free -= length

    def try_reserve(self, length: int) -> bool:
        """Take `length` bytes if they are to spare."""
        if length > self.spare:
            return False
        self.free -= length
        return True

    def release(self, length: int) -> None:
        """Give back what was reserved."""
        self.free += length
        self._is_freed.set()
        self._call_first()

    @contextmanager
    def tried(self, length: int) -> Iterator[bool]:
        """Have `length` bytes inside, if they are to spare; tells whether."""
        is_reserved = self.try_reserve(length)
        try:
            yield is_reserved
        finally:
            if is_reserved:
                self.release(length)

    @asynccontextmanager
    async def reserved(self, length: int) -> AsyncIterator[None]:
        """Have `length` bytes for a merge; waits in turn until they are free, unless it is the only one."""
        async with self._turn:
            while self._merge_count and length > self.free:
                self._is_freed.clear()
                await self._is_freed.wait()
            self._merge_count += 1
            self.free -= length
        try:
            yield
        finally:
            self._merge_count -= 1
            self.release(length)

    # -- requests -----------------------------------------------------------------------------

    def admit(self, length: int, when_freed: Callable[[], None]) -> bool:
        """Tell whether a request may take `length` bytes of what is common now.

        If not, `when_freed` is called when it is worth to ask again; until then, and until `leave`, it keeps
        its place in the queue.
        """
        self._queue.setdefault(when_freed)
        if not self._is_first(when_freed) or (length > self.free and self._of_requests):
            return False
        self.leave(when_freed)
        return True

    def leave(self, when_freed: Callable[[], None]) -> None:
        """Wait no more."""
        was_first = self._is_first(when_freed)
        self._queue.pop(when_freed, None)
        if was_first:
            self._call_first()

    def move(self, length: int) -> None:
        """Requests take `length` bytes more of what is common, or less."""
        self._of_requests += length
        if length < 0:
            self.release(-length)
        else:
            self.free -= length

    def _is_first(self, when_freed: Callable[[], None]) -> bool:
        return next(iter(self._queue), None) == when_freed

    def _call_first(self) -> None:
        if self._queue:
            next(iter(self._queue))()


guest_memory = GuestMemory()
