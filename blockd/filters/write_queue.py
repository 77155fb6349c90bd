"""The order between guest writes and copies of the same clusters.

A copy brings old data; a guest write brings new data, and always wins:

- A guest write that covers a whole cluster cancels the copy of it, and goes on at once.
- A guest write that covers part of a cluster waits for the copy, whose data it needs around it; while
  somebody merges what is staged, it is staged instead and goes on at once (staged_writes.py).
- What was staged lands on top of the copy: after the guest writes to its cluster that came before, and
  before those that come later, for it is older than they are.
- A copy waits for guest writes and other copies of its clusters that came before it. What it then
  finds there it leaves alone: after waiting, the map is looked at again.
- A guest read does not wait for the copies of streams: what they copy it reads from below.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from blockd.extents import Range, RangeSet
from blockd.units import align_down, align_up


class Entry:
    """One copy or guest write in flight, over the whole clusters `[start, end)`."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.done = asyncio.get_running_loop().create_future()

    def overlaps(self, start: int, end: int) -> bool:
        return self.start < end and start < self.end


class Copy(Entry):
    """A copy of some ranges of clusters, some of which may have been cancelled."""

    def __init__(self, ranges: Sequence[Range], *, is_for_guest: bool) -> None:
        super().__init__(ranges[0][0], ranges[-1][1])
        self.ranges = ranges
        self.is_for_guest = is_for_guest
        self._clusters = RangeSet(ranges)
        self._cancelled = RangeSet()

    def overlaps(self, start: int, end: int) -> bool:
        return super().overlaps(start, end) and self._clusters.touches(start, end)

    def clipped(self, start: int, end: int) -> Iterator[Range]:
        """What is copied of a range, cancelled or not."""
        return self._clusters.clipped(start, end)

    def cancel(self, start: int, end: int) -> None:
        """The copy of these clusters is no longer wanted."""
        if start < end and self.overlaps(start, end):
            self._cancelled.add(start, end)

    def is_wanted(self, start: int, end: int) -> bool:
        """Whether all clusters of a range are."""
        return not self._cancelled or not self._cancelled.touches(start, end)

    def brings(self, offset: int) -> bool:
        """Whether the cluster at `offset` is being copied."""
        return self.overlaps(offset, offset + 1) and self.is_wanted(offset, offset + 1)


class WriteQueue:
    """What is in flight on one active image; few enough entries for linear looks."""

    def __init__(self, cluster_size: int) -> None:
        self._cluster_size = cluster_size
        self._copies: list[Copy] = []
        self._writes: list[Entry] = []
        self._landings: list[Entry] = []

    @asynccontextmanager
    async def copying(self, ranges: Sequence[Range], *, is_for_guest: bool = False) -> AsyncIterator[Copy]:
        """Be the only copy of these clusters, with no guest write under way when it starts.

        What lies between the ranges is nobody's business: guests write there as if there were no copy.

        `is_for_guest`: of what a guest is about to read, and no more.

        Needs:    ranges in order; starts and ends are multiples of the cluster size.
        Cancel:   while waiting: nothing is entered.
        """
        copy = Copy(ranges, is_for_guest=is_for_guest)
        while (before := self._before_copy(copy)) is not None:
            await asyncio.shield(before.done)
        self._copies.append(copy)
        try:
            yield copy
        finally:
            self._copies.remove(copy)
            copy.done.set_result(None)

    def _before_copy(self, copy: Copy) -> Entry | None:
        """What a copy has to wait for."""
        for write in self._writes:
            if copy.overlaps(write.start, write.end):
                return write
        for other in self._copies:
            if any(copy.overlaps(start, end) for start, end in other.clipped(copy.start, copy.end)):
                return other
        return None

    @asynccontextmanager
    async def writing(self, offset: int, end: int) -> AsyncIterator[None]:
        """Write `[offset, end)` ahead of every copy that has not started yet.

        Needs:    an end that is the disk's end is given rounded up to a whole cluster.
        Cancel:   while waiting: nothing is entered; copies may have been cancelled for nothing.
        """
        start, aligned_end = align_down(offset, self._cluster_size), align_up(end, self._cluster_size)
        while (before := self._before_write(offset, end)) is not None:
            await asyncio.shield(before.done)
        with _entered(self._writes, start, aligned_end):
            yield

    def _before_write(self, offset: int, end: int) -> Entry | None:
        """Cancel the copies of wholly covered clusters; returns what the write has to wait for."""
        self.cancel_copies(align_up(offset, self._cluster_size), align_down(end, self._cluster_size))
        needed = _overlapping_cluster(self._copies, self._partial_clusters(offset, end))
        return needed or _overlapping(self._landings, align_down(offset, self._cluster_size), end)

    def uncopied(self, start: int, end: int) -> list[Range]:
        """The parts of a range, in order, that no copy is under way for, but for those for guests."""
        parts = [(start, end)] if start < end else []
        for copy in (copy for copy in self._copies if not copy.is_for_guest):
            parts = [part for low, high in parts for part in _without(copy, low, high)]
        return parts

    def cancel_copies(self, start: int, end: int) -> None:
        """Let go of the copies of these clusters: they are about to get content, or have some."""
        for copy in self._copies:
            copy.cancel(start, end)

    @asynccontextmanager
    async def landing(self, start: int, end: int) -> AsyncIterator[None]:
        """Write what was staged of a cluster, between the guest writes before and those after.

        Cancel:   while waiting: nothing is entered.
        """
        while (before := _overlapping([*self._writes, *self._landings], start, end)) is not None:
            await asyncio.shield(before.done)
        with _entered(self._landings, start, end):
            yield

    async def landed(self, start: int, end: int) -> None:
        """Return when nothing lands on these clusters."""
        while (before := _overlapping(self._landings, start, end)) is not None:
            await asyncio.shield(before.done)

    def _partial_clusters(self, offset: int, end: int) -> list[int]:
        """The clusters, by offset, of which the range covers only a part."""
        return [
            align_down(position, self._cluster_size)
            for position in (offset, end)
            if position % self._cluster_size
        ]


@contextmanager
def _entered(entries: list[Entry], start: int, end: int) -> Iterator[None]:
    entry = Entry(start, end)
    entries.append(entry)
    try:
        yield
    finally:
        entries.remove(entry)
        entry.done.set_result(None)


def _without(copy: Copy, start: int, end: int) -> Iterator[Range]:
    """What of a range is not copied."""
    for low, high in copy.clipped(start, end):
        if start < low:
            yield start, low
        start = high
    if start < end:
        yield start, end


def _overlapping(entries: Iterable[Entry], start: int, end: int) -> Entry | None:
    return next((entry for entry in entries if entry.overlaps(start, end)), None)


def _overlapping_cluster(copies: Iterable[Copy], clusters: list[int]) -> Copy | None:
    return next((copy for copy in copies for cluster in clusters if copy.brings(cluster)), None)
