"""Copying for a fill without touching the bytes: pages go from the source's cache to the disk.

Zeroes are still left out. A cluster of data almost never begins with many of them, so its first
bytes are read, and the whole cluster only if they are zeroes.
"""

from collections.abc import Iterator

from blockd.block.node import BlockingSource, ProtocolNode, Segment
from blockd.units import KIB, align_down

# In smaller clusters looking at the first bytes costs as much as copying.
CLUSTER_SIZE_MIN = 32 * KIB
_SAMPLE = bytes(512)


def pass_pages(
    file: ProtocolNode, host_offset: int, segments: list[Segment], cluster_size: int, zero_clusters: set[int]
) -> int:
    """Write what the segments hold to `host_offset` on, from the start, as far as that can be.

    Positions of clusters that are all zeroes are added to `zero_clusters` and not written. Returns up to
    where all is done: a multiple of the cluster size.
    """
    position = 0
    if cluster_size < CLUSTER_SIZE_MIN:
        return position
    for segment in segments:
        source, whole = segment.source, align_down(segment.length, cluster_size)
        if not isinstance(source, BlockingSource) or not file.takes_pages_of(source):
            break
        for start, count, is_zero in _runs(source, segment.offset, whole, cluster_size):
            if is_zero:
                zero_clusters.update(range(position, position + count, cluster_size))
                done = count
            else:
                done = file.pass_pages_blocking(host_offset + position, source, segment.offset + start, count)
            position += align_down(done, cluster_size)
            if done < count:
                return position
        if whole < segment.length:
            break
    return position


def _runs(
    source: BlockingSource, offset: int, length: int, cluster_size: int
) -> Iterator[tuple[int, int, bool]]:
    """Neighbouring clusters, by whether they are all zeroes: where they start, their length."""
    cluster, zeroes = bytearray(cluster_size), bytes(cluster_size)
    start, was_zero = 0, False
    for position in range(0, length, cluster_size):
        is_zero = _is_zero(source, offset + position, cluster, zeroes)
        if is_zero != was_zero and start < position:
            yield start, position - start, was_zero
            start = position
        was_zero = is_zero
    if start < length:
        yield start, length - start, was_zero


def _is_zero(source: BlockingSource, offset: int, cluster: bytearray, zeroes: bytes) -> bool:
    source.readinto_blocking(offset, memoryview(cluster)[: len(_SAMPLE)])
    if not cluster.startswith(_SAMPLE):
        return False
    source.readinto_blocking(offset, memoryview(cluster))
    return cluster == zeroes
