"""How long guests wait for the image while it is streamed into.

Only for what copies may keep them from: requests that the image does not answer at once. To wait because
the source has not delivered yet is not to wait for the image.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class GuestWaits:
    """The requests of one disk, since they were last asked for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Requests that were tried at once, whether that went or not; never set back.
        self.tried_count = 0
        self._tried_before = 0
        self._over_count = 0
        self._over_s = 0.0
        self._pending: dict[object, float] = {}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A guest waits for what is done inside."""
        key = object()
        self._pending[key] = self._clock()
        try:
            yield
        finally:
            self._over_s += self._clock() - self._pending.pop(key)
            self._over_count += 1

    def take(self) -> float | None:
        """Tell how long requests took on the average since this was last asked; None: there were none.

        One that is not answered yet took as long as it is under way. What was answered at once counts only
        if there is nothing else: it took no time.
        """
        now = self._clock()
        total_s = self._over_s + sum(now - started for started in self._pending.values())
        count = self._over_count + len(self._pending)
        was_tried = self.tried_count != self._tried_before
        self._over_s, self._over_count, self._tried_before = 0.0, 0, self.tried_count
        if count:
            return total_s / count
        return 0.0 if was_tried else None
