"""Filling: how a stream or copy-on-read puts data where the image holds nothing yet.

The copy goes to clusters that nothing names, in one thread hop that reads, finds zeroes, allocates for
what is none, writes and starts the write-back. Only then is the map changed, cluster by cluster, where
the cluster is still empty and still wanted. A guest write that comes meanwhile therefore never waits for a
copy, and a copy never overwrites one.
"""

from functools import partial
from typing import TYPE_CHECKING

from blockd.aio import in_thread
from blockd.block.file_events import FileEvent
from blockd.block.node import FillCounts, IsWanted, Segment
from blockd.formats.copying import Part, Read, Target, source_reader, split_zeroes
from blockd.formats.publishing import GiveBack, Piece, give_back_pieces, publish_pieces
from blockd.formats.qed.allocator import Run
from blockd.formats.qed.large_clusters import BUFFER_LENGTH, copy_blocking
from blockd.formats.qed.mapping import UNALLOCATED, ZERO
from blockd.formats.qed.metadata import Metadata
from blockd.units import align_up

if TYPE_CHECKING:
    from blockd.formats.qed.image import QedImage


async def fill(
    image: "QedImage",
    offset: int,
    length: int,
    source: list[Segment],
    is_wanted: IsWanted,
    *,
    keep_cached: bool,
) -> FillCounts:
    """Do what `OverlayNode.fill` promises."""
    metadata, size = image.metadata, image.cluster_size
    await metadata.relieve()
    pieces: list[Piece] = []
    try:
        copy = _Copy(image, pieces, keep_cached=keep_cached)
        parts: list[Part] = []
        for start, end in await _empty_ranges(image, offset, length):
            for low, high, is_zero in split_zeroes(image, start, end, offset, source):
                if is_zero:
                    pieces.append(Piece(low, (high - low) // size, None))
                else:
                    parts.append(Part(low, high - low, partial(copy.place, low)))
        image.file.announce(FileEvent.COR_WRITE)
        zero_clusters = await copy.run(parts, offset, source) if parts else set()
        pieces += [Piece(cluster, 1, None) for cluster in zero_clusters]
    except BaseException:
        give_back_pieces(pieces, _giving_back(metadata))
        raise
    return await _publish(metadata, sorted(pieces), is_wanted)


async def _empty_ranges(image: "QedImage", offset: int, length: int) -> list[tuple[int, int]]:
    """The ranges of unallocated clusters, rounded up to whole clusters at the disk's end."""
    ranges = []
    end = offset + length
    while offset < end:
        for start, count, entry in await image.runs(offset, end - offset):
            offset = start + count
            if entry == UNALLOCATED:
                ranges.append((start, align_up(offset, image.cluster_size)))
    return ranges


class _Copy:
    """One copy: allocates for what has to be stored, in the thread that copies, and notes where it went."""

    def __init__(self, image: "QedImage", pieces: list[Piece], *, keep_cached: bool) -> None:
        self._target = Target(image.file, image.cluster_size, keep_cached)
        self._cluster_size = image.cluster_size
        self._allocator = image.metadata.allocator
        self._pieces = pieces

    async def run(self, parts: list[Part], offset: int, source: list[Segment]) -> set[int]:
        """Copy the source into the parts; returns the guest offsets of clusters that are all zeroes."""
        if self._cluster_size <= BUFFER_LENGTH:
            return await self._target.copy(parts, offset, source)
        return await in_thread(self._copy_large_blocking, parts, await source_reader(offset, source))

    def place(self, part_offset: int, position: int, length: int) -> tuple[int, int]:
        run = self._allocate(part_offset + position, length // self._cluster_size)
        return run.host_offset, run.cluster_count * self._cluster_size

    def _allocate(self, offset: int, cluster_count: int) -> Run:
        run = self._allocator.allocate(cluster_count)
        self._pieces.append(Piece(offset, run.cluster_count, run.host_offset))
        return run

    def _copy_large_blocking(self, parts: list[Part], read: Read) -> set[int]:
        zero_clusters: set[int] = set()
        size = self._cluster_size
        for part in parts:
            for cluster in range(part.offset, part.offset + part.length, size):
                is_stored = copy_blocking(
                    self._target.file,
                    size,
                    partial(_read_at, read, cluster),
                    partial(self._allocate, cluster, 1),
                    self._target.write_blocking,
                )
                if not is_stored:
                    zero_clusters.add(cluster)
        return zero_clusters


def _read_at(read: Read, start: int, position: int, buffer: memoryview) -> None:
    read(start + position, buffer)


def _giving_back(metadata: Metadata) -> GiveBack:
    return lambda host_offset, cluster_count: metadata.allocator.give_back(Run(host_offset, cluster_count))


# -- publishing -------------------------------------------------------------------------------


async def _publish(metadata: Metadata, pieces: list[Piece], is_wanted: IsWanted) -> FillCounts:
    """Put the copies into the map; what is not published is given back."""
    mapping = metadata.mapping

    async def publish(piece: Piece) -> FillCounts:
        await metadata.writable_page(piece.offset >> mapping.page_bits)
        return _publish_piece(metadata, piece, is_wanted)

    return await publish_pieces(
        pieces, mapping.cluster_bits, mapping.page_bits, publish, _giving_back(metadata)
    )


def _publish_piece(metadata: Metadata, piece: Piece, is_wanted: IsWanted) -> FillCounts:
    """Publish a piece that one page in memory maps."""
    mapping, size = metadata.mapping, metadata.header.cluster_size
    number = piece.offset >> mapping.page_bits
    page = mapping.pages[number]
    index = (piece.offset >> mapping.cluster_bits) & mapping.index_mask
    entries = page.entries[index : index + piece.cluster_count].tolist()
    dropped = 0
    for position, old in enumerate(entries):
        offset = piece.offset + position * size
        host_offset = ZERO if piece.host_offset is None else piece.host_offset + position * size
        if old == UNALLOCATED and is_wanted(offset, offset + size):
            entries[position] = host_offset
            continue
        dropped += 1
        if piece.host_offset is not None:
            metadata.allocator.give_back(Run(host_offset, 1))
    mapping.set_entries(number, page, index, entries)
    stored = piece.cluster_count - dropped
    return FillCounts(0, stored, dropped) if piece.host_offset is None else FillCounts(stored, 0, dropped)
