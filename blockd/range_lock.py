"""Ranges in flight: who overlaps waits.

One small list with a contract. Few ranges are ever in flight at once, so a linear look is the
fastest structure there is. After waiting, state may have changed: look again before acting.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple

from blockd.extents import Range, RangeSet


class _Entry(NamedTuple):
    """Ranges that somebody holds, and where they start and end."""

    ranges: RangeSet
    start: int
    end: int
    released: asyncio.Future[None]


class RangeLock:
    """Exclusive locks on ranges `[start, end)`."""

    def __init__(self) -> None:
        self._held: list[_Entry] = []

    def __bool__(self) -> bool:
        """Whether any range is held."""
        return bool(self._held)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any part of the range is held."""
        return self._holder(start, end) is not None

    def _holder(self, start: int, end: int) -> asyncio.Future[None] | None:
        for entry in self._held:
            if entry.start < end and start < entry.end and entry.ranges.touches(start, end):
                return entry.released
        return None

    async def wait(self, start: int, end: int) -> None:
        """Return when no part of the range is held."""
        while (released := self._holder(start, end)) is not None:
            await asyncio.shield(released)

    def held(self, start: int, end: int) -> AbstractAsyncContextManager[None]:
        """Hold the range; waits for overlapping holders first.

        Cancel:   while waiting: nothing is held.
        """
        return self.held_together([(start, end)])

    @asynccontextmanager
    async def held_together(self, ranges: Sequence[Range]) -> AsyncIterator[None]:
        """Hold several ranges, which are in order, but not what is between them; as `held`.

        They are had all at once: who holds some never waits for others.
        """
        while (released := self._first_holder(ranges)) is not None:
            await asyncio.shield(released)
        entry = _Entry(
            RangeSet(ranges), ranges[0][0], ranges[-1][1], asyncio.get_running_loop().create_future()
        )
        self._held.append(entry)
        try:
            yield
        finally:
            self._held.remove(entry)
            entry.released.set_result(None)

    def _first_holder(self, ranges: Sequence[Range]) -> asyncio.Future[None] | None:
        holders = (self._holder(start, end) for start, end in ranges)
        return next((holder for holder in holders if holder is not None), None)
