"""Where new clusters go: behind the end of the file, or to clusters that were given back.

QED counts no references: what no table names is free, and nobody keeps a list of it. A cluster that a
map has named stays where it is for good (a discard frees its space, not its place), so nothing ever
has to wait before it can be used again. What an allocation takes and no map comes to name is given
back, kept in memory, and taken by the next allocations; at the end of the file it is cut off.

    fresh    behind the end of the file: reads as zeroes once the file has grown over it
    used     given back: may hold anything

A *place* is for a copy that another process makes, past the page cache. It begins right behind the last one,
or else with a folio of the cache, and ends with one, so that guests' writes do not share its folios. Only one
is taken at a time: what a copy leaves of it is at the end, and fresh still. What is passed over in front of
a place is for the same fill to copy through the cache, or it might be free amid others for good.

Threads:  allocations come from the event loop and from threads that copy.
Source:   QED specification, "Specification"; the end of the file decides, as in QEMU.
"""

import threading
from collections.abc import Iterable
from typing import NamedTuple

from blockd.block.node import ProtocolNode
from blockd.units import align_down, align_up


class Run(NamedTuple):
    """Neighbouring host clusters."""

    host_offset: int
    cluster_count: int
    is_fresh: bool = False


class Allocator:
    """Gives out the host clusters of one image."""

    def __init__(self, file: ProtocolNode, cluster_size: int, free: Iterable[Run] = ()) -> None:
        self._file = file
        self.cluster_size = cluster_size
        self._lock = threading.Lock()
        self.folio_length = max(file.folio_length, cluster_size)
        self._end = align_up(file.size, cluster_size)
        # Where the last copy to a place ends, if nothing but tables was allocated behind it.
        self._place_end = 0
        self._free = list(free)
        if file.size < self._end:  # a part of a cluster, which no table can name
            self._free.append(Run(align_down(file.size, cluster_size), 1))

    def allocate(self, cluster_count: int) -> Run:
        """Allocate neighbouring clusters, at least one and at most `cluster_count`."""
        with self._lock:
            if not self._free:
                return self._extend(cluster_count)
            run = self._free.pop()
            rest_count = run.cluster_count - cluster_count
            if rest_count > 0:
                first_left = run.host_offset + cluster_count * self.cluster_size
                self._free.append(Run(first_left, rest_count))
                run = Run(run.host_offset, cluster_count)
            return run

    def allocate_fresh(self, cluster_count: int) -> Run:
        """Allocate exactly `cluster_count` neighbours that read as zeroes."""
        with self._lock:
            is_behind_place = self._end == self._place_end
            run = self._extend(cluster_count)
            if is_behind_place:
                self._place_end = self._end  # no guest writes there
            return run

    def _extend(self, cluster_count: int) -> Run:
        run = Run(self._end, cluster_count, is_fresh=True)
        self._end += cluster_count * self.cluster_size
        return run

    def give_back(self, run: Run) -> None:
        """Undo an allocation that no map, in memory or on disk, has ever named."""
        with self._lock:
            self._free.append(run._replace(is_fresh=False))

    # -- places for copies --------------------------------------------------------------------

    def take_passed_over(self, length: int) -> list[Run] | None:
        """Allocate what is free, and what the next place passes over, for a part of a copy of `length` bytes.

        None: less than a folio would be left for a place.
        """
        with self._lock:
            gap = self._gap()
            free = sum(run.cluster_count for run in self._free) * self.cluster_size
            if length < free + gap + self.folio_length:
                return None
            taken, self._free = self._free, []
            if gap:
                taken.append(self._extend(gap // self.cluster_size))
            return taken

    def _gap(self) -> int:
        """How much lies between the end and where a place may begin."""
        return 0 if self._end == self._place_end else -self._end % self.folio_length

    def take_place(self, length: int) -> Run:
        """Allocate a place for so many bytes, up to where a folio ends.

        Needs:    the one before was given back, as much of it as was not used.
        """
        with self._lock:
            gap = self._gap()  # guests may have been here since `take_passed_over`
            if gap:
                self._free.append(self._extend(gap // self.cluster_size))
            end = align_up(self._end + length, self.folio_length)
            return self._extend((end - self._end) // self.cluster_size)

    def finish_place(self, place: Run, used_count: int, *, is_rest_fresh: bool) -> None:
        """Give back what was not used of a place, from its end."""
        end = place.host_offset + used_count * self.cluster_size
        with self._lock:
            is_last = self._end_of(place) == self._end
            if is_last and is_rest_fresh:
                self._end = self._place_end = end
            elif used_count < place.cluster_count:
                rest = place._replace(
                    host_offset=end, cluster_count=place.cluster_count - used_count, is_fresh=False
                )
                self._free.append(rest)

    # -- the end ------------------------------------------------------------------------------

    def used_end(self) -> int:
        """Where the last cluster ends that is not free."""
        with self._lock:
            end = self._end
            for run in sorted(self._free, reverse=True):
                if self._end_of(run) < end:
                    break
                end = run.host_offset
            return end

    def cut(self, end: int) -> None:
        """The file ends at `used_end` now.

        Needs:    nothing was allocated since that was told.
        """
        with self._lock:
            self._free = [run for run in self._free if run.host_offset < end]
            self._end = end

    @property
    def free(self) -> list[Run]:
        """The free clusters, in no order."""
        with self._lock:
            return list(self._free)

    def _end_of(self, run: Run) -> int:
        return run.host_offset + run.cluster_count * self.cluster_size
