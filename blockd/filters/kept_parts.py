"""What guests wrote to parts of clusters whose other parts the source has not delivered yet.

A guest must not wait for a slow source, and a format cannot store a part of a cluster that it does not
hold. So the part is kept in memory, and is put on top when the rest of the cluster has been copied.
What is kept is newer than what the image has; what covers the whole cluster later is newer still, and
drops it.
"""

import asyncio
from collections.abc import Iterable, Iterator

from blockd.block.node import Buffer
from blockd.units import MIB, align_down

# What is kept at most: bytes, each piece counted with what it costs besides, and clusters. Each cluster
# costs a request to the source, and a flush has to wait for all of them.
KEPT_LENGTH_MAX = 16 * MIB
KEPT_CLUSTER_COUNT_MAX = 256
PIECE_COST = 256


class KeptCluster:
    """The pieces of one cluster: sorted, apart from each other."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        # Somebody is about to merge it, or has tried and failed; a flush tries again.
        self.is_taken = False
        self._pieces: list[tuple[int, bytearray]] = []

    @property
    def cost(self) -> int:
        return sum(PIECE_COST + len(data) for _, data in self._pieces)

    def covers(self, end: int) -> bool:
        """Whether all of the cluster up to `end` is here."""
        start, data = self._pieces[0]
        return start == self.offset and start + len(data) >= end

    def put(self, offset: int, data: Buffer) -> None:
        """Keep `data` too; it is newer than what is there."""
        end = offset + len(data)
        for start, kept in self._pieces:
            if start <= offset and end <= start + len(kept):
                kept[offset - start : end - start] = data
                return
        met = [piece for piece in self._pieces if piece[0] <= end and offset <= piece[0] + len(piece[1])]
        start = min(offset, met[0][0]) if met else offset
        joined = bytearray(max(end, met[-1][0] + len(met[-1][1])) - start) if met else bytearray(data)
        for position, old in [*met, (offset, data)]:
            joined[position - start : position - start + len(old)] = old
        self._pieces = sorted([piece for piece in self._pieces if piece not in met] + [(start, joined)])

    def pieces(self, offset: int, end: int) -> Iterator[tuple[int, Buffer]]:
        """Copies of what is kept of a range."""
        for start, data in self._pieces:
            low, high = max(start, offset), min(start + len(data), end)
            if low < high:
                yield low, bytes(data[low - start : high - start])


class KeptParts:
    """The kept clusters of one disk, the oldest first."""

    def __init__(self, cluster_size: int) -> None:
        self._cluster_size = cluster_size
        self._clusters: dict[int, KeptCluster] = {}
        self._cost = 0
        self._put = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._clusters)

    def __contains__(self, cluster_offset: int) -> bool:
        return cluster_offset in self._clusters

    def touches(self, start: int, end: int) -> bool:
        """Whether any cluster of a range has something kept."""
        return any(offset in self._clusters for offset in self._offsets(start, end))

    def clusters(self, start: int, end: int) -> list[KeptCluster]:
        """The kept clusters of a range, in the order of the disk."""
        return [self._clusters[offset] for offset in self._offsets(start, end) if offset in self._clusters]

    def _offsets(self, start: int, end: int) -> Iterable[int]:
        """Where clusters of a range may be kept; there are always few."""
        start = align_down(start, self._cluster_size)
        if end - start <= len(self._clusters) * self._cluster_size:
            return range(start, end, self._cluster_size)
        return sorted(offset for offset in self._clusters if start <= offset < end)

    # -- what guests do -----------------------------------------------------------------------

    def has_room(self, offset: int, length: int) -> bool:
        """Whether a piece of `length` bytes may be kept too."""
        is_known = align_down(offset, self._cluster_size) in self._clusters
        count = len(self._clusters) + (not is_known)
        return count <= KEPT_CLUSTER_COUNT_MAX and self._cost + length + PIECE_COST <= KEPT_LENGTH_MAX

    def put(self, offset: int, data: Buffer) -> None:
        """Keep a part of one cluster."""
        start = align_down(offset, self._cluster_size)
        cluster = self._clusters.setdefault(start, KeptCluster(start))
        self._cost -= cluster.cost
        cluster.put(offset, data)
        self._cost += cluster.cost
        self._put.set()

    def pieces(self, offset: int, length: int) -> list[tuple[int, Buffer]]:
        """What is kept of a range, in order, none of it twice."""
        end = offset + length
        return [piece for cluster in self.clusters(offset, end) for piece in cluster.pieces(offset, end)]

    def drop(self, start: int, end: int) -> None:
        """Forget what is kept of the clusters of a range: it was merged, or written over."""
        for cluster in self.clusters(start, end):
            self._cost -= cluster.cost
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

    def runs(self, length_max: int) -> list[tuple[int, int]]:
        """All that is kept, taken or not, as ranges of neighbouring clusters of at most `length_max`."""
        runs: list[tuple[int, int]] = []
        for offset in sorted(self._clusters):
            end = offset + self._cluster_size
            if runs and runs[-1][1] == offset and end - runs[-1][0] <= length_max:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((offset, end))
        return runs
