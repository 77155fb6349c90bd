"""Filling: how a stream or copy-on-read puts data where the image holds nothing yet.

The copy goes to clusters that nothing names, in one thread hop that reads, finds zeroes, writes and
starts the write-back. Only then is the map changed, cluster by cluster, where the cluster is still
empty and still wanted. A guest write that comes meanwhile therefore never waits for a copy, and a
copy never overwrites one.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from blockd.aio import in_thread
from blockd.block.file_events import FileEvent
from blockd.block.node import FillCounts, IsWanted, Segment
from blockd.formats.copying import Part, Target, split_zeroes
from blockd.formats.publishing import GiveBack, Piece, give_back_pieces, publish_pieces
from blockd.formats.qcow2.allocator import Run
from blockd.formats.qcow2.mapping import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from blockd.formats.qcow2.metadata import Metadata
from blockd.units import align_up

if TYPE_CHECKING:
    from blockd.formats.qcow2.image import Qcow2Image


async def fill(
    image: "Qcow2Image",
    offset: int,
    length: int,
    source: list[Segment],
    is_wanted: IsWanted,
    *,
    keep_cached: bool,
) -> FillCounts:
    """Do what `OverlayNode.fill` promises."""
    metadata = image.metadata
    await metadata.relieve()
    pieces: list[Piece] = []
    try:
        for start, end in await empty_ranges(image, offset, length):
            for piece_start, piece_end, is_zero in split_zeroes(image, start, end, offset, source):
                can_be_zero = is_zero and metadata.knows_zero
                pieces += await _place(metadata, piece_start, piece_end, is_zero=can_be_zero)
        image.file.announce(FileEvent.COR_WRITE)
        parts = list(_parts(pieces, image.cluster_size))
        target = Target(image.file, image.cluster_size, keep_cached)
        zero_clusters = await target.copy(parts, offset, source)
        if zero_clusters and not metadata.knows_zero:
            await in_thread(_write_zeroes, target, parts, zero_clusters)
            zero_clusters = set()
    except BaseException:
        give_back_pieces(pieces, _giving_back(metadata))
        raise
    return await _publish(metadata, pieces, zero_clusters, is_wanted)


async def empty_ranges(image: "Qcow2Image", offset: int, length: int) -> list[tuple[int, int]]:
    """The ranges of unallocated clusters, rounded up to whole clusters at the disk's end."""
    ranges = []
    end = offset + length
    while offset < end:
        for start, count, entry in await image.runs(offset, end - offset):
            offset = start + count
            if not entry:
                ranges.append((start, align_up(offset, image.cluster_size)))
    return ranges


async def _place(metadata: Metadata, start: int, end: int, *, is_zero: bool) -> list[Piece]:
    """Allocate clusters for a range, in as few runs as there are.

    Fails to: nothing is allocated.
    """
    bits = metadata.header.cluster_bits
    cluster_count = (end - start) >> bits
    if is_zero:
        return [Piece(start, cluster_count, None)]
    pieces: list[Piece] = []
    try:
        while cluster_count:
            run = await metadata.allocate(cluster_count)
            pieces.append(Piece(start, run.cluster_count, run.host_offset))
            start += run.cluster_count << bits
            cluster_count -= run.cluster_count
    except BaseException:
        give_back_pieces(pieces, _giving_back(metadata))
        raise
    return pieces


def _parts(pieces: list[Piece], cluster_size: int) -> Iterator[Part]:
    """What is copied: nothing for a piece that is all zeroes."""
    for offset, cluster_count, host_offset in pieces:
        if host_offset is not None:
            yield Part.at(offset, cluster_count * cluster_size, host_offset)


def _write_zeroes(target: Target, parts: list[Part], zero_clusters: set[int]) -> None:
    """Store what the map cannot say."""
    cluster = memoryview(bytes(target.cluster_size))
    for part in parts:
        for position in range(0, part.length, target.cluster_size):
            if part.offset + position in zero_clusters:
                target.write_part_blocking(part, position, cluster)


def _giving_back(metadata: Metadata) -> GiveBack:
    return lambda host_offset, cluster_count: metadata.allocator.give_back(Run(host_offset, cluster_count))


# -- publishing -------------------------------------------------------------------------------


async def _publish(
    metadata: Metadata, pieces: list[Piece], zero_clusters: set[int], is_wanted: IsWanted
) -> FillCounts:
    """Put the copies into the map; what is not published is given back."""
    mapping = metadata.mapping

    async def publish(piece: Piece) -> FillCounts:
        await metadata.writable_table(piece.offset >> mapping.table_bits)
        return _publish_piece(metadata, piece, zero_clusters, is_wanted)

    return await publish_pieces(
        pieces, mapping.cluster_bits, mapping.table_bits, publish, _giving_back(metadata)
    )


def _publish_piece(
    metadata: Metadata, piece: Piece, zero_clusters: set[int], is_wanted: IsWanted
) -> FillCounts:
    """Publish a piece that one table in memory maps."""
    mapping, size = metadata.mapping, metadata.header.cluster_size
    l1_index = piece.offset >> mapping.table_bits
    table = mapping.tables[l1_index]
    index = (piece.offset >> mapping.cluster_bits) & mapping.index_mask
    entries = table.entries[index : index + piece.cluster_count]
    offsets = range(piece.offset, piece.offset + piece.cluster_count * size, size)
    is_all_wanted = is_wanted(offsets.start, offsets.stop)
    is_as_planned = is_all_wanted and not any(entries) and zero_clusters.isdisjoint(offsets)
    if piece.host_offset is not None and is_as_planned:  # nearly always, and guests wait for this
        first = piece.host_offset | COPIED
        mapping.set_entries(l1_index, table, index, range(first, first + len(offsets) * size, size))
        return FillCounts(piece.cluster_count, 0, 0)
    copied = zeroed = dropped = 0
    for number, (offset, old) in enumerate(zip(offsets, entries, strict=True)):
        host_offset = None if piece.host_offset is None else piece.host_offset + number * size
        is_zero = host_offset is None or offset in zero_clusters
        is_dropped = bool(old & (OFFSET_MASK | COMPRESSED | ZERO)) or not is_wanted(offset, offset + size)
        if host_offset is not None and (is_zero or is_dropped):
            metadata.allocator.give_back(Run(host_offset, 1))
        if is_dropped:
            dropped += 1
        elif host_offset is None or is_zero:
            zeroed += 1
            entries[number] = ZERO
        else:
            copied += 1
            entries[number] = host_offset | COPIED
    mapping.set_entries(l1_index, table, index, entries)
    return FillCounts(copied, zeroed, dropped)
