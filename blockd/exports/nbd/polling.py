"""Looking for the next request for a moment before going to sleep.

A guest that has one request in flight waits for two processors to be woken up, its own and the daemon's; that
takes longer than a read from memory. A daemon that is still awake answers at once. But it uses a processor
that others may need, the guest first of all. So whether it pays is measured all the time: now and then some
turns are taken in the other way, and the way that answers more requests in the same time is gone on with.
"""

import asyncio
import time
from collections.abc import Callable

from blockd.aio import thread_calls

# How long to look; what wakes a guest up on a virtual machine takes a good part of it.
POLL_S = 0.0002
# How long turns are taken in one way before the other is tried, and how long that takes: several slices of a
# processor's time, as who has slept gets his first one at once.
RUN_S = 0.5
TRIAL_S = 0.025
# Nobody who takes turns as short as this has to be woken up: on a busy machine, or on a processor of both.
SHORT_TURN_S = 0.00004
# How many times as fast answers have to be for a processor to be spent on it.
GAIN_MIN = 1.1
# Between turns that are further apart the guest had something else to do; processors are taken away for less.
INTERVAL_MAX_S = 0.02


class Polling:
    """What the connections of a server share. Polls for `poll_s` at most; 0: never."""

    def __init__(self, poll_s: float = POLL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_on = False
        self._poll_s = poll_s
        self._clock = clock
        self._is_trial = False
        self._turn_count = 0
        self._elapsed_s = 0.0
        self._period_s = TRIAL_S
        # The mean time from turn to turn, without and with polling.
        self._means_s = [0.0, 0.0]
        self._last_turn = self._until = 0.0
        self._is_looking = False

    def turn_done(self) -> None:
        """Replies have left: the guest may answer them with its next request."""
        if not self._poll_s:
            return
        now = self._clock()
        interval, self._last_turn = now - self._last_turn, now
        if interval < INTERVAL_MAX_S:
            self._count(interval)
        self._until = now + self._poll_s
        if self.is_on and not self._is_looking:
            self._is_looking = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Have the loop come round once more, without sleeping: it looks for input as it does so."""
        # Threads need the interpreter, too, and what they do takes longer than waking up.
        if self.is_on and self._clock() < self._until and not thread_calls.count:
            asyncio.get_running_loop().call_soon(self._look)
        else:
            self._is_looking = False

    def _count(self, interval: float) -> None:
        self._turn_count += 1
        self._elapsed_s += interval
        if self._elapsed_s >= self._period_s:
            self._means_s[self.is_on] = self._elapsed_s / self._turn_count
            self._turn_count, self._elapsed_s = 0, 0.0
            self._choose()

    def _choose(self) -> None:
        """After a run try the other way; after a trial go on in the better one."""
        sleeping_s, polling_s = self._means_s
        if self._is_trial:
            self.is_on = polling_s * GAIN_MIN < sleeping_s
            self._is_trial = False
        elif self.is_on or sleeping_s > SHORT_TURN_S:
            self.is_on = not self.is_on
            self._is_trial = True
        self._period_s = TRIAL_S if self._is_trial else RUN_S
