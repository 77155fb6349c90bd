"""Whether writes to a file may be made on the event loop, told by how they went.

A buffered write is a memory copy, unless the kernel makes the writer wait: for the disk, when there are
too many dirty pages, or for a lock that somebody holds who waits for it. Time alone does not tell: on a
busy machine the processor is also taken away from a writer in the middle of its copy, and threads would
only make that worse. The kernel counts how often a thread gave its processor up by itself; whoever waits
does, whoever is made to stop does not. Asking costs about as much as a small write, so that is done only
for a while after a slow one:

    open        a slow write: watched; a very slow one: closed
    watched     a slow write that waited: closed; after some time without a slow one: open
    closed      nothing is written on the loop; after some time: watched
"""

import resource
from collections.abc import Callable

# A write that takes longer than this has waited, or was made to stop.
SLOW_WRITE_S = 0.010
# Nobody is made to stop for as long as this; or if so, threads do not matter any more.
VERY_SLOW_WRITE_S = 0.100
# How many times as long as a write that waited the others stay off the loop: it waits for the disk at most
# a twentieth of the time.
CLOSED_FACTOR = 20
# How many times as long as a slow write, at least, the following ones are watched.
WATCHED_FACTOR = 100


def own_wait_count() -> int:
    """How often this thread has given its processor up to wait for something."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class Stalls:
    """What is known of one file's writes. Times are `time.monotonic()`."""

    def __init__(self, wait_count: Callable[[], int] = own_wait_count) -> None:
        # Until then `may_write` is to be asked before each write.
        self.watched_until = 0.0
        self._closed_until = 0.0
        self._wait_count = wait_count
        self._count_before = 0

    def may_write(self, now: float) -> bool:
        """Whether the next write may be made on the loop; if so it is watched."""
        if now < self._closed_until:
            return False
        self._count_before = self._wait_count()
        return True

    def note_slow_write(self, started: float, finished: float) -> None:
        """A write on the loop took longer than `SLOW_WRITE_S`."""
        duration = finished - started
        was_watched = started < self.watched_until
        if self._wait_count() != self._count_before if was_watched else duration > VERY_SLOW_WRITE_S:
            self._closed_until = finished + CLOSED_FACTOR * duration
        self.watched_until = max(self.watched_until, finished + WATCHED_FACTOR * duration)
