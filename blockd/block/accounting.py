"""What guests did to a disk: counters that cost next to nothing.

Requests that are answered at once are timed a turn of the event loop at a time, all others one by one.
"""

import time


class Counter:
    """One kind of request."""

    __slots__ = ("byte_count", "failed", "invalid", "operations", "time_ns")

    def __init__(self) -> None:
        self.operations = 0
        self.byte_count = 0
        self.time_ns = 0
        # The disk's fault, and the guest's; neither counts as an operation.
        self.failed = 0
        self.invalid = 0

    def add(self, byte_count: int, time_ns: int) -> None:
        """Count one that succeeded."""
        self.operations += 1
        self.byte_count += byte_count
        self.time_ns += time_ns


# Guests are at work that asked for something so lately.
GUEST_TIME_S = 1.0


class AllGuests:
    """All disks together."""

    __slots__ = ("last_ns",)

    def __init__(self) -> None:
        # When something was last done; 0: never.
        self.last_ns = 0

    @property
    def are_at_work(self) -> bool:
        """Whether any guest asked for something lately."""
        return time.monotonic_ns() - self.last_ns <= GUEST_TIME_S * 1e9


all_guests = AllGuests()


class DiskStats:
    """All kinds of requests to one disk; zeroing counts as writing."""

    __slots__ = ("flush", "highest_write", "last_ns", "read", "unmap", "write")

    def __init__(self) -> None:
        self.read = Counter()
        self.write = Counter()
        self.unmap = Counter()
        self.flush = Counter()
        # Where the write that went furthest ended.
        self.highest_write = 0
        # When something was last done; 0: never.
        self.last_ns = 0

    def note_write(self, end: int) -> None:
        self.highest_write = max(self.highest_write, end)

    def done_at_once(self) -> tuple[int, int, int]:
        """How many requests are done of the kinds that may be answered at once, for `share_time`."""
        return self.read.operations, self.write.operations, self.unmap.operations

    def share_time(self, time_ns: int, before: tuple[int, int, int]) -> None:
        """Account for the time of a turn, before which `done_at_once` was this."""
        reads, writes, unmaps = before
        reads = self.read.operations - reads
        writes = self.write.operations - writes
        unmaps = self.unmap.operations - unmaps
        if count := reads + writes + unmaps:
            self.last_ns = all_guests.last_ns = time.monotonic_ns()
            self.read.time_ns += time_ns * reads // count
            self.write.time_ns += time_ns * writes // count
            self.unmap.time_ns += time_ns * unmaps // count
