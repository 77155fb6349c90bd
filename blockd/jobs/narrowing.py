"""Where a copy fails: down to single clusters, so that all around them is copied.

A copy is large, and one bad sector fails all of it. It is made again in chunks, and those that fail cluster
by cluster. Each chunk with something bad is one failure, from its start on: QEMU copies in chunks of this
length, and its clients know how far a job is, and how many errors it has met, by them.
"""

from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple

from blockd.errors import StorageError
from blockd.extents import Extent, Kind
from blockd.units import KIB

CHUNK_LENGTH = 512 * KIB

Populate = Callable[[Extent], Awaitable[None]]


class Failure(NamedTuple):
    """A chunk that failed: where it begins, what is left to be copied, perhaps nothing, and why."""

    offset: int
    pieces: list[Extent]
    error: StorageError


async def narrow(
    populate: Populate, taken: list[Extent], cluster_size: int, error: StorageError, *, finds_all: bool
) -> list[Failure]:
    """Copy again what failed together: all that can be, or without `finds_all` up to the first bad cluster.

    Shape:    failures in order of their offsets, at least one; without `finds_all` one, with all that is
              left.
    """
    failures: list[Failure] = []
    chunks = list(_cut(taken, max(CHUNK_LENGTH, cluster_size)))
    for number, chunk in enumerate(chunks):
        # A copy of one chunk has failed already.
        chunk_error = error if len(chunks) == 1 else await _error_of(populate, chunk)
        if chunk_error is None:
            continue
        left = await _narrow_chunk(populate, list(_cut([chunk], cluster_size)), finds_all=finds_all)
        failures.append(Failure(chunk.offset, left, chunk_error))
        if not finds_all:
            left += chunks[number + 1 :]
            break
    # What does not fail again has failed all the same, and is told.
    return failures or [Failure(taken[0].offset, [], error)]


async def _narrow_chunk(populate: Populate, clusters: list[Extent], *, finds_all: bool) -> list[Extent]:
    """Copy single clusters; tells which are left."""
    if len(clusters) == 1:
        return clusters
    left: list[Extent] = []
    for number, cluster in enumerate(clusters):
        if await _error_of(populate, cluster) is not None:
            if not finds_all:
                return clusters[number:]
            left.append(cluster)
    return left


async def _error_of(populate: Populate, piece: Extent) -> StorageError | None:
    try:
        await populate(piece)
    except StorageError as error:
        return error
    return None


def _cut(pieces: list[Extent], length: int) -> Iterator[Extent]:
    for piece in pieces:
        for offset in range(piece.offset, piece.end, length):
            yield Extent(offset, min(length, piece.end - offset), Kind.DATA)
