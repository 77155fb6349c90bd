"""Clusters that may take space on the disk, though nothing was ever to be found in them.

What a file has reserved behind its end is taken whether it is used or not. So are clusters that were
allocated, and perhaps written, for a copy that did not come into the map, and those that are passed over
because a copy has to begin at a multiple of some length.
"""

from blockd.units import MIB

# How many ranges are remembered.
RANGE_COUNT_MAX = 1 << 14
# Of more than this nothing is reserved: it is a hole (`FileEnd`).
PASSED_OVER_LENGTH_MAX = 64 * MIB


class UnusedSpace:
    """Ranges of clusters of a file that has `end` clusters now."""

    def __init__(self, end: int, cluster_size: int) -> None:
        self._end = end
        self._count_max = PASSED_OVER_LENGTH_MAX // cluster_size
        self._ranges: list[range] = []

    def note(self, clusters: range) -> None:
        """Clusters were allocated, and are free again."""
        if len(self._ranges) < RANGE_COUNT_MAX:
            self._ranges.append(clusters)

    def note_allocated(self, first: int, end: int) -> None:
        """Clusters are allocated: those behind the end of the file, but before these, were passed over."""
        if end <= self._end:
            return
        if 0 < first - self._end <= self._count_max:
            self.note(range(self._end, first))
        self._end = end

    def take(self) -> list[range]:
        """Hand out all ranges; some of their clusters may be in use.

        Shape:    in order; neighbours and what overlaps are one.
        """
        taken: list[range] = []
        for clusters in sorted(self._ranges, key=lambda clusters: clusters.start):
            if taken and clusters.start <= taken[-1].stop:
                taken[-1] = range(taken[-1].start, max(taken[-1].stop, clusters.stop))
            else:
                taken.append(clusters)
        self._ranges = []
        return taken
