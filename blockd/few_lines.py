"""What the log says of guests' requests, and of clusters, that fail: there may be thousands a second.

The event loop writes each line, perhaps to the disk that is full. The counters and events have every failure;
the log has the first one, and from then on at most one a second.
"""

import logging
import time
from collections.abc import Callable

INTERVAL_NS = 1_000_000_000


class FewLines:
    """Lines about the same thing."""

    def __init__(self, log: logging.Logger, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._log = log
        self._clock_ns = clock_ns
        self._next_ns = 0
        self._untold_count = 0

    def warn(self, message: str, *values: object) -> None:
        """Write a line, or count it for the next one."""
        now_ns = self._clock_ns()
        if now_ns < self._next_ns:
            self._untold_count += 1
            return
        more = f" ({self._untold_count} more since the line before)" if self._untold_count else ""
        self._log.warning(f"{message}%s", *values, more)
        self._next_ns = now_ns + INTERVAL_NS
        self._untold_count = 0
