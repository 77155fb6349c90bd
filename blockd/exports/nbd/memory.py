"""The memory that requests of all connections together may hold."""

from collections.abc import Callable

from blockd.units import MIB

# For requests that wait. A connection's first request is always admitted, so that one greedy client
# slows the others down but never stops them: in all at most this and one request per connection.
MEMORY_MAX = 256 * MIB
# Kept for the next large writes: fresh memory costs a page fault every 4 KiB, about as much as the copy.
SPARE_MAX = 16 * MIB


class RequestMemory:
    """Counts the bytes that waiting requests hold, and lends buffers for large writes."""

    def __init__(self, limit: int = MEMORY_MAX) -> None:
        self._limit = self._free = limit
        self._waiting: set[Callable[[], None]] = set()
        self._spares: list[bytearray] = []
        self._spare_size = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is reserved and nobody waits."""
        return self._free == self._limit and not self._waiting

    def reserve(self, length: int, *, first: bool, when_freed: Callable[[], None]) -> bool:
        """Admit a request of `length` bytes; when there is no room now, `when_freed` is called later."""
        if length > self._free and not first:
            self._waiting.add(when_freed)
            return False
        self._free -= length
        return True

    def release(self, length: int) -> None:
        """Give back what was reserved."""
        self._free += length
        waiting, self._waiting = self._waiting, set()
        for when_freed in waiting:
            when_freed()

    def forget(self, when_freed: Callable[[], None]) -> None:
        """Do not call `when_freed` any more."""
        self._waiting.discard(when_freed)

    def lend(self, length: int) -> bytearray:
        """Return a buffer of at least `length` bytes, with anything in it."""
        for index, spare in enumerate(self._spares):
            if length <= len(spare) <= 2 * length:
                self._spare_size -= len(spare)
                return self._spares.pop(index)
        return bytearray(length)

    def take_back(self, buffer: bytearray) -> None:
        """Keep a lent buffer for the next borrower, if there is room for it."""
        if self._spare_size + len(buffer) <= SPARE_MAX:
            self._spares.append(buffer)
            self._spare_size += len(buffer)
