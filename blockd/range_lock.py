"""Ranges in flight: who overlaps waits.

One small list with a contract. Few ranges are ever in flight at once, so a linear look is the
fastest structure there is. After waiting, state may have changed: look again before acting.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class RangeLock:
    """Exclusive locks on ranges `[start, end)`."""

    def __init__(self) -> None:
        self._held: list[tuple[int, int, asyncio.Future[None]]] = []

    def __bool__(self) -> bool:
        """Whether any range is held."""
        return bool(self._held)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any part of the range is held."""
        return self._holder(start, end) is not None

    def _holder(self, start: int, end: int) -> asyncio.Future[None] | None:
        for low, high, released in self._held:
            if low < end and start < high:
                return released
        return None

    async def wait(self, start: int, end: int) -> None:
        """Return when no part of the range is held."""
        while (released := self._holder(start, end)) is not None:
            await asyncio.shield(released)

    @asynccontextmanager
    async def held(self, start: int, end: int) -> AsyncIterator[None]:
        """Hold the range; waits for overlapping holders first.

        Cancel:   while waiting: nothing is held.
        """
        await self.wait(start, end)
        entry = (start, end, asyncio.get_running_loop().create_future())
        self._held.append(entry)
        try:
            yield
        finally:
            self._held.remove(entry)
            entry[2].set_result(None)
