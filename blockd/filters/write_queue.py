"""The order between guest writes and copies of the same clusters.

A copy brings old data; a guest write brings new data, and always wins:

- A guest write that covers a whole cluster cancels the copy of it, and goes on at once.
- A guest write that covers part of a cluster waits for the copy, whose data it needs around it.
- A copy waits for guest writes and other copies of its clusters that came before it. What it then
  finds there it leaves alone: after waiting, the map is looked at again.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

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
    """A copy, some clusters of which may have been cancelled."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__(start, end)
        self._cancelled: list[tuple[int, int]] = []

    def cancel(self, start: int, end: int) -> None:
        """The copy of these clusters is no longer wanted."""
        if self.overlaps(start, end):
            self._cancelled.append((start, end))

    def is_wanted(self, cluster_offset: int) -> bool:
        return not any(start <= cluster_offset < end for start, end in self._cancelled)


class WriteQueue:
    """What is in flight on one active image; few enough entries for linear looks."""

    def __init__(self, cluster_size: int) -> None:
        self._cluster_size = cluster_size
        self._copies: list[Copy] = []
        self._writes: list[Entry] = []

    @asynccontextmanager
    async def copying(self, start: int, end: int) -> AsyncIterator[Copy]:
        """Be the only copy of these clusters, with no guest write under way when it starts.

        Needs:    start and end are multiples of the cluster size.
        Cancel:   while waiting: nothing is entered.
        """
        while (before := _overlapping([*self._writes, *self._copies], start, end)) is not None:
            await asyncio.shield(before.done)
        copy = Copy(start, end)
        self._copies.append(copy)
        try:
            yield copy
        finally:
            self._copies.remove(copy)
            copy.done.set_result(None)

    @asynccontextmanager
    async def writing(self, offset: int, end: int) -> AsyncIterator[None]:
        """Write `[offset, end)` ahead of every copy that has not started yet.

        Needs:    an end that is the disk's end is given rounded up to a whole cluster.
        Cancel:   while waiting: nothing is entered; copies may have been cancelled for nothing.
        """
        start, aligned_end = align_down(offset, self._cluster_size), align_up(end, self._cluster_size)
        while (needed := self._cancel_copies(offset, end)) is not None:
            await asyncio.shield(needed.done)
        entry = Entry(start, aligned_end)
        self._writes.append(entry)
        try:
            yield
        finally:
            self._writes.remove(entry)
            entry.done.set_result(None)

    def _cancel_copies(self, offset: int, end: int) -> Copy | None:
        """Cancel the copies of wholly covered clusters; returns one that the write has to wait for."""
        first, last = align_up(offset, self._cluster_size), align_down(end, self._cluster_size)
        for copy in self._copies:
            if first < last:
                copy.cancel(first, last)
        return _overlapping_cluster(self._copies, self._partial_clusters(offset, end))

    def _partial_clusters(self, offset: int, end: int) -> list[int]:
        """The clusters, by offset, of which the range covers only a part."""
        return [
            align_down(position, self._cluster_size)
            for position in (offset, end)
            if position % self._cluster_size
        ]


def _overlapping(entries: Iterable[Entry], start: int, end: int) -> Entry | None:
    return next((entry for entry in entries if entry.overlaps(start, end)), None)


def _overlapping_cluster(copies: Iterable[Copy], clusters: list[int]) -> Copy | None:
    for copy in copies:
        if any(copy.overlaps(cluster, cluster + 1) and copy.is_wanted(cluster) for cluster in clusters):
            return copy
    return None
