"""The memory that requests of all connections together may hold."""

import asyncio
from collections.abc import Callable

from blockd import freed_memory
from blockd.block.guest_memory import GuestMemory, guest_memory
from blockd.units import MIB

# Kept for the next large writes: fresh memory costs a page fault every 4 KiB, about as much as the copy.
SPARE_MAX = 16 * MIB
# After as much as this was in use, and nothing is any more for a moment, the system gets it back.
TRIM_MIN = 32 * MIB


class RequestMemory:
    """Counts the bytes that requests and their replies hold, and lends buffers for large writes."""

    def __init__(self, max_connections: int, budget: GuestMemory = guest_memory) -> None:
        self.budget = budget
        # What each connection may hold whatever others do.
        self.share = budget.shares // max_connections
        self._held = 0
        # The most that was held since memory was given back to the system.
        self._peak = 0
        self._is_trim_due = False
        self._spares: list[bytearray] = []
        self._spare_size = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is held."""
        return not self._held

    def change(self, length: int) -> None:
        """So many bytes more are held, or less."""
        self._held += length
        self._peak = max(self._peak, self._held)
        if not self._held and self._peak >= TRIM_MIN and not self._is_trim_due:
            self._is_trim_due = True
            asyncio.get_running_loop().call_later(freed_memory.AFTER_S, self._trim)

    def _trim(self) -> None:
        """Give back to the system what the allocator has kept of a burst, unless another one is under way."""
        self._is_trim_due = False
        if not self._held:
            self._peak = 0
            asyncio.get_running_loop().run_in_executor(None, freed_memory.give_back)

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


class ConnectionMemory:
    """What the requests and replies of one connection hold: its share, beyond that of what is common."""

    def __init__(self, memory: RequestMemory, when_freed: Callable[[], None]) -> None:
        self.held = 0
        self._memory = memory
        self._budget = memory.budget
        self._share = memory.share
        self._when_freed = when_freed
        # Whether a request has a place in the queue for what is common.
        self.is_waiting = False

    @property
    def room(self) -> int:
        """How many bytes can be taken now without waiting for anybody."""
        return max(0, self._share - self.held) + self._budget.spare

    def try_take(self, length: int) -> bool:
        """Admit a request of `length` bytes; if there is no room now, it waits in turn: see `GuestMemory`.

        A connection that would hold more of what is common than is left waits for its own requests
        instead: if its disk hangs, others have as much as it has, and need not wait behind it.
        """
        held = self._common(self.held)
        common = self._common(self.held + length) - held
        if not common:
            self.wait_no_more()
        elif held and held + common > self._budget.free:
            self.wait_no_more()
            return False
        else:
            self.is_waiting = not self._budget.admit(common, self._when_freed)
            if self.is_waiting:
                return False
        self.change(length)
        return True

    def change(self, length: int) -> None:
        """Hold so many bytes more, whether there is room or not, or less."""
        before, self.held = self._common(self.held), self.held + length
        self._memory.change(length)
        if moved := self._common(self.held) - before:
            self._budget.move(moved)

    def wait_no_more(self) -> None:
        """Leave the queue: nothing is asked for, or nothing can be taken for another reason."""
        if self.is_waiting:
            self.is_waiting = False
            self._budget.leave(self._when_freed)

    def close(self) -> None:
        """Give everything back."""
        self.wait_no_more()
        self.change(-self.held)

    def _common(self, held: int) -> int:
        return max(0, held - self._share)
