"""A rate limit: how long to wait after a number of bytes."""

import asyncio
from collections.abc import Callable

# Time that the work itself took, or that a wait was too long, is made up for, up to this much: a job that
# was held up longer does not catch up in one burst.
SLICE_S = 0.1


class RateLimit:
    """Spreads work so that on average no more than the speed's bytes per second are done."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._speed = 0
        # When everything accounted so far may have been done.
        self._due = clock()

    def set_speed(self, bytes_per_second: int) -> None:
        """Change the speed from now on; 0 lifts the limit. What was owed at the old speed is forgiven."""
        self._speed = bytes_per_second
        self._due = self._clock()

    async def wait(self, byte_count: int) -> None:
        """Account for `byte_count` bytes just done and wait until the next may follow."""
        if not self._speed:
            return
        now = self._clock()
        self._due = max(self._due, now - SLICE_S) + byte_count / self._speed
        await asyncio.sleep(max(0.0, self._due - now))
