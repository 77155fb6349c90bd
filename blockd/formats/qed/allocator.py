"""Where new clusters go: behind the end of the file, or to clusters that were given back.

QED counts no references: what no table names is free, and nobody keeps a list of it. A cluster that a
map has named stays where it is for good (a discard frees its space, not its place), so nothing ever
has to wait before it can be used again. What an allocation takes and no map comes to name is given
back, kept in memory, and taken by the next allocations; at the end of the file it is cut off.

    fresh    behind the end of the file: reads as zeroes once the file has grown over it
    used     given back: may hold anything

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
        self._cluster_size = cluster_size
        self._lock = threading.Lock()
        self._end = align_up(file.size, cluster_size)
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
                first_left = run.host_offset + cluster_count * self._cluster_size
                self._free.append(Run(first_left, rest_count))
                run = Run(run.host_offset, cluster_count)
            return run

    def allocate_fresh(self, cluster_count: int) -> Run:
        """Allocate exactly `cluster_count` neighbours that read as zeroes."""
        with self._lock:
            return self._extend(cluster_count)

    def _extend(self, cluster_count: int) -> Run:
        run = Run(self._end, cluster_count, is_fresh=True)
        self._end += cluster_count * self._cluster_size
        return run

    def give_back(self, run: Run) -> None:
        """Undo an allocation that no map, in memory or on disk, has ever named."""
        with self._lock:
            self._free.append(run._replace(is_fresh=False))

    def trim(self) -> int | None:
        """Let go of the free clusters at the end; returns the length to cut the file to, if it is to be cut.

        Needs:    nothing is being allocated or written.
        """
        with self._lock:
            self._free.sort()
            while self._free and self._end_of(self._free[-1]) == self._end:
                self._end = self._free.pop().host_offset
            return self._end if self._end < self._file.size else None

    def _end_of(self, run: Run) -> int:
        return run.host_offset + run.cluster_count * self._cluster_size
