"""What guests wrote to parts of clusters whose other parts the source has not delivered yet.

A guest must not wait for a slow source, and a format cannot store a part of a cluster that it does not
hold. So the part is staged in memory, and is put on top when the rest of the cluster has been copied.
What is staged is newer than what the image has; what covers the whole cluster later is newer still, and
drops it.
"""

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from blockd.block.guest_memory import guest_memory
from blockd.block.node import Buffer
from blockd.units import MIB, align_down

# What is staged at most: bytes, each piece counted with what it costs besides, and clusters. Each cluster
# costs a request to the source, and a flush has to wait for all of them.
STAGED_LENGTH_MAX = 16 * MIB
STAGED_CLUSTER_COUNT_MAX = 256
PIECE_COST = 256


class StagedCluster:
    """The pieces of one cluster: sorted, apart from each other. A write costs the same beside many."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        # Somebody is about to merge it, or has tried and failed; a flush tries again.
        self.is_taken = False
        # How many bytes there are.
        self.length = 0
        # Where each piece begins, and what it is.
        self._starts: list[int] = []
        self._pieces: list[bytearray] = []

    @property
    def cost(self) -> int:
        return PIECE_COST * len(self._pieces) + self.length

    def covers(self, end: int) -> bool:
        """Whether all of the cluster up to `end` is here."""
        return self._starts[0] == self.offset and self.offset + len(self._pieces[0]) >= end

    def put(self, offset: int, data: Buffer) -> None:
        """Keep `data` too; it is newer than what is there."""
        end = offset + len(data)
        first, last = self._first_to(offset), bisect_right(self._starts, end)
        met = self._pieces[first:last]
        before = sum(map(len, met))
        start, joined = offset, bytearray()
        if met and self._starts[first] <= offset:
            start, joined = self._starts[first], met[0]  # grows in place: guests write one after the other
        joined[offset - start : end - start] = data
        for position, piece in zip(self._starts[first:last], met, strict=True):
            joined += piece[start + len(joined) - position :]
        self._starts[first:last], self._pieces[first:last] = [start], [joined]
        self.length += len(joined) - before

    def _first_to(self, offset: int) -> int:
        """The number of the first piece that ends at `offset` or later."""
        number = bisect_right(self._starts, offset)
        if number and self._starts[number - 1] + len(self._pieces[number - 1]) >= offset:
            return number - 1
        return number

    def pieces(self, offset: int, end: int) -> Iterator[tuple[int, Buffer]]:
        """Copies of what is staged of a range."""
        for number in range(self._first_to(offset), bisect_left(self._starts, end)):
            start, data = self._starts[number], self._pieces[number]
            low, high = max(start, offset), min(start + len(data), end)
            if low < high:
                yield low, bytes(data[low - start : high - start])


class StagedWrites:
    """The staged clusters of one disk, the oldest first."""

    def __init__(self, cluster_size: int) -> None:
        self._cluster_size = cluster_size
        self._clusters: dict[int, StagedCluster] = {}
        self._cost = 0
        self._put = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._clusters)

    def __contains__(self, cluster_offset: int) -> bool:
        return cluster_offset in self._clusters

    @property
    def length(self) -> int:
        """How many bytes are staged."""
        return sum(cluster.length for cluster in self._clusters.values())

    def touches(self, start: int, end: int) -> bool:
        """Whether any cluster of a range has something staged."""
        return any(offset in self._clusters for offset in self._offsets(start, end))

    def clusters(self, start: int, end: int) -> list[StagedCluster]:
        """The staged clusters of a range, in the order of the disk."""
        return [self._clusters[offset] for offset in self._offsets(start, end) if offset in self._clusters]

    def _offsets(self, start: int, end: int) -> Iterable[int]:
        """Where clusters of a range may be staged; there are always few."""
        start = align_down(start, self._cluster_size)
        if end - start <= len(self._clusters) * self._cluster_size:
            return range(start, end, self._cluster_size)
        return sorted(offset for offset in self._clusters if start <= offset < end)

    # -- what guests do -----------------------------------------------------------------------

    def has_room(self, offset: int, length: int) -> bool:
        """Whether a piece of `length` bytes may be staged too."""
        is_known = align_down(offset, self._cluster_size) in self._clusters
        count = len(self._clusters) + (not is_known)
        if length + PIECE_COST > guest_memory.spare:
            return False
        return count <= STAGED_CLUSTER_COUNT_MAX and self._cost + length + PIECE_COST <= STAGED_LENGTH_MAX

    def put(self, offset: int, data: Buffer) -> None:
        """Keep a part of one cluster."""
        start = align_down(offset, self._cluster_size)
        cluster = self._clusters.setdefault(start, StagedCluster(start))
        before = cluster.cost
        cluster.put(offset, data)
        self._cost += cluster.cost - before
        guest_memory.reserve(cluster.cost - before)
        self._put.set()

    def pieces(self, offset: int, length: int) -> list[tuple[int, Buffer]]:
        """What is staged of a range, in order, none of it twice."""
        end = offset + length
        return [piece for cluster in self.clusters(offset, end) for piece in cluster.pieces(offset, end)]

    def drop(self, start: int, end: int) -> None:
        """Forget what is staged of the clusters of a range: it was merged, or written over."""
        for cluster in self.clusters(start, end):
            self._cost -= cluster.cost
            guest_memory.release(cluster.cost)
            del self._clusters[cluster.offset]

    # -- what merges do -----------------------------------------------------------------------

    async def take(self, length_max: int) -> tuple[int, int]:
        """Wait for clusters that nobody has taken yet, and take some neighbours of at most `length_max`."""
        while (run := self._take_nowait(length_max)) is None:
            self._put.clear()
            await self._put.wait()
        return run

    def _take_nowait(self, length_max: int) -> tuple[int, int] | None:
        first = next((cluster for cluster in self._clusters.values() if not cluster.is_taken), None)
        if first is None:
            return None
        start = end = first.offset
        while (cluster := self._clusters.get(end)) is not None and not cluster.is_taken:
            if start < end and end + self._cluster_size - start > length_max:
                break
            cluster.is_taken = True
            end += self._cluster_size
        return start, end

    def offer_again(self) -> None:
        """Let clusters be taken again whose merge has failed."""
        for cluster in self._clusters.values():
            cluster.is_taken = False
        self._put.set()

    def runs(self, length_max: int) -> list[tuple[int, int]]:
        """All that is staged, taken or not, as ranges of neighbouring clusters of at most `length_max`."""
        runs: list[tuple[int, int]] = []
        for offset in sorted(self._clusters):
            end = offset + self._cluster_size
            if runs and runs[-1][1] == offset and end - runs[-1][0] <= length_max:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((offset, end))
        return runs
