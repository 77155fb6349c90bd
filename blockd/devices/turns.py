"""Whose turn it is to change disks: one change at a time, and nobody waits for ever behind one that hangs."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal

from blockd.aio import process_calls, thread_calls
from blockd.errors import RequestError

# How long a change may wait for a file, which may never answer, before others have no turn behind it.
TURN_MAX_S = 60.0


class NoTurn(RequestError):
    """The change that is being made waits for a file that does not answer; nothing else can be changed."""


class ChangeLock(asyncio.Lock):
    """What the change holds that is being made, and for how long it has."""

    def __init__(self) -> None:
        super().__init__()
        self.turn_max_s = TURN_MAX_S
        self._since = 0.0

    async def acquire(self) -> Literal[True]:
        await super().acquire()
        self._since = time.monotonic()
        return True

    @property
    def held_s(self) -> float:
        return time.monotonic() - self._since if self.locked() else 0.0

    async def unless_hanging(self, wait: Callable[[], Awaitable[object]]) -> None:
        """Wait for what needs its turn, but not for longer than the change before it may wait for a file.

        Raises:   NoTurn: that does not answer; what needs its turn may still have it later.
        """
        while not await self._has_come(wait):
            if (lasted_s := self._hanging_s()) >= self.turn_max_s:
                raise NoTurn(
                    f"Another change waits for a file that has not answered for {lasted_s:.0f} s; nothing "
                    "can be changed until it does. Guests and queries go on"
                )

    async def _has_come(self, wait: Callable[[], Awaitable[object]]) -> bool:
        try:
            async with asyncio.timeout(self.turn_max_s - self._hanging_s()):
                await wait()
        except TimeoutError:
            return False
        return True

    def _hanging_s(self) -> float:
        """For how long the change that is being made has waited for a file, at most."""
        return min(self.held_s, max(thread_calls.longest_s, process_calls.longest_s))
