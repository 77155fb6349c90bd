"""Filling: how a stream or copy-on-read puts data where the image holds nothing yet.

The copy goes to clusters that nothing names, in one thread hop that reads, finds zeroes, allocates for
what is none, writes and starts the write-back. Only then is the map changed, cluster by cluster, where
the cluster is still empty and still wanted. A guest write that comes meanwhile therefore never waits for a
copy, and a copy never overwrites one.

While guests are at work another process copies, to a place of its own. What that passes over, and what is
free amid others, the thread fills up then, through the page cache: guests write beside it.
"""

from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING

from blockd.aio import in_thread
from blockd.block.file_events import FileEvent
from blockd.block.node import FillCounts, IsWanted
from blockd.block.segments import SourcePlan
from blockd.extents import Range
from blockd.formats.copying import (
    Part,
    Read,
    Target,
    empty_ranges,
    source_reader,
    split_zeroes,
)
from blockd.formats.copying_apart import ApartCopies, pieces_of
from blockd.formats.publishing import GiveBack, Layout, Piece, give_back_pieces, publish_pieces
from blockd.formats.qed.allocator import Run
from blockd.formats.qed.large_clusters import BUFFER_LENGTH, copy_blocking
from blockd.formats.qed.mapping import UNALLOCATED, ZERO, Page
from blockd.formats.qed.metadata import Metadata

if TYPE_CHECKING:
    from blockd.formats.qed.image import QedImage


async def fill(
    image: "QedImage",
    ranges: Sequence[Range],
    source: SourcePlan,
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
        stored: list[Range] = []
        for start, end, is_zero in split_zeroes(image, await empty_ranges(image, ranges), source):
            if is_zero:
                pieces.append(Piece(start, (end - start) // size, None))
            else:
                stored.append((start, end))
        image.file.announce(FileEvent.COR_WRITE)
        zero_clusters = await copy.run(stored, source) if stored else set()
        pieces += [Piece(cluster, 1, None) for cluster in zero_clusters]
    except BaseException:
        give_back_pieces(pieces, _giving_back(metadata))
        raise
    return await _publish(image, sorted(pieces, key=itemgetter(0)), is_wanted)


class _Copy:
    """One copy: allocates for what has to be stored, in the thread that copies, and notes where it went.

    What another process copies gets its places before (copying_apart.py).
    """

    def __init__(self, image: "QedImage", pieces: list[Piece], *, keep_cached: bool) -> None:
        self._image = image
        self._target = Target(image.file, image.cluster_size, keep_cached)
        self._cluster_size = image.cluster_size
        self._allocator = image.metadata.allocator
        self._pieces = pieces
        # What is used up before anything is allocated.
        self._taken: list[Run] = []

    async def run(self, ranges: list[Range], source: SourcePlan) -> set[int]:
        """Copy the source into some ranges; returns the guest offsets of clusters that are all zeroes."""
        if self._cluster_size > BUFFER_LENGTH:
            return await in_thread(self._copy_large_blocking, ranges, await source_reader(source))
        whole = Part.at(ranges, 0)
        if not self._image.copies_apart or self._target.keep_cached:
            return await self._copy_by_threads(whole, source, self._target)
        # Threads, too: what they had behind another copy's place would keep its rest from being cut off. So
        # would tables, but for those that are there before.
        async with self._image.metadata.copy_places.taking:
            try:
                await self._make_tables(ranges)
                return await self._copy_apart(whole, source)
            finally:
                for run in self._taken:
                    self._allocator.give_back(run)

    async def _make_tables(self, ranges: list[Range]) -> None:
        metadata, mapping = self._image.metadata, self._image.metadata.mapping
        for start, end in ranges:
            for offset in (*range(start, end, 1 << mapping.table_bits), end - 1):
                if not mapping.has_table(offset >> mapping.page_bits):
                    await metadata.writable_page(offset >> mapping.page_bits)

    async def _copy_apart(self, part: Part, source: SourcePlan) -> set[int]:
        """Let another process copy what does not go where guests write beside it."""
        taken = self._allocator.take_passed_over(part.length)
        if taken is None:
            return await self._copy_by_threads(part, source, self._target)
        self._taken = taken
        zero_clusters, position = await self._fill_up(part, source)
        places = self._image.metadata.copy_places
        apart = ApartCopies(self._image, self._target, source, places, self._pieces)
        rest = _part_from(part, position, part.length)
        position = await apart.copy(rest, rest.length)
        rest = _part_from(rest, position, rest.length)
        return zero_clusters | await self._copy_by_threads(rest, source, self._target)

    async def _fill_up(self, part: Part, source: SourcePlan) -> tuple[set[int], int]:
        """Fill up what was passed over; tells zeroes, and how much of the part is done then."""
        through_cache = self._target._replace(keep_cached=True)
        zero_clusters: set[int] = set()
        position = 0
        while self._taken and position < part.length:
            free_length = sum(run.cluster_count for run in self._taken) * self._cluster_size
            end = min(position + free_length, part.length)
            stretch = _part_from(part, position, end)
            zero_clusters |= await self._copy_by_threads(stretch, source, through_cache)
            position = end
        return zero_clusters, position

    async def _copy_by_threads(self, whole: Part, source: SourcePlan, target: Target) -> set[int]:
        if not whole.length:
            return set()
        part = Part(whole.ranges, whole.length, lambda *stretch: self._place(part, *stretch))
        return await target.copy([part], source)

    def _place(self, part: Part, position: int, length: int) -> tuple[int, int]:
        run = self._allocated(length // self._cluster_size)
        self._pieces.extend(
            pieces_of(
                part, position, run.cluster_count * self._cluster_size, run.host_offset, self._cluster_size
            )
        )
        return run.host_offset, run.cluster_count * self._cluster_size

    def _allocated(self, cluster_count: int) -> Run:
        if not self._taken:
            return self._allocator.allocate(cluster_count)
        run = self._taken.pop()
        if run.cluster_count > cluster_count:
            rest_offset = run.host_offset + cluster_count * self._cluster_size
            self._taken.append(Run(rest_offset, run.cluster_count - cluster_count))
        return run._replace(cluster_count=min(cluster_count, run.cluster_count))

    def _allocate_one(self, offset: int) -> Run:
        run = self._allocator.allocate(1)
        self._pieces.append(Piece(offset, 1, run.host_offset))
        return run

    def _copy_large_blocking(self, ranges: list[Range], read: Read) -> set[int]:
        zero_clusters: set[int] = set()
        size = self._cluster_size
        for cluster in (cluster for start, end in ranges for cluster in range(start, end, size)):
            is_stored = copy_blocking(
                self._target.file,
                size,
                partial(_read_at, read, cluster),
                partial(self._allocate_one, cluster),
                self._target.write_blocking,
            )
            if not is_stored:
                zero_clusters.add(cluster)
        return zero_clusters


def _part_from(part: Part, start: int, end: int) -> Part:
    """A stretch of a part."""
    return Part.at(list(part.guest_ranges(start, end - start)), 0)


def _read_at(read: Read, start: int, position: int, buffer: memoryview) -> None:
    read(start + position, buffer)


def _giving_back(metadata: Metadata) -> GiveBack:
    return lambda host_offset, cluster_count: metadata.allocator.give_back(Run(host_offset, cluster_count))


# -- publishing -------------------------------------------------------------------------------


async def _publish(image: "QedImage", pieces: list[Piece], is_wanted: IsWanted) -> FillCounts:
    """Put the copies into the map; what is not published is given back."""
    metadata, mapping = image.metadata, image.metadata.mapping

    async def publish(pieces: list[Piece]) -> FillCounts:
        await metadata.writable_page(pieces[0].offset >> mapping.page_bits)
        counts = [_publish_piece(metadata, piece, is_wanted) for piece in pieces]
        return FillCounts(*map(sum, zip(*counts, strict=True)))

    layout = Layout(mapping.cluster_bits, mapping.page_bits, image.records_zeroes)
    return await publish_pieces(pieces, layout, publish, _giving_back(metadata))


def _publish_piece(metadata: Metadata, piece: Piece, is_wanted: IsWanted) -> FillCounts:
    """Publish a piece that one page in memory maps."""
    mapping, size = metadata.mapping, metadata.header.cluster_size
    number = piece.offset >> mapping.page_bits
    page = mapping.pages[number]
    index = (piece.offset >> mapping.cluster_bits) & mapping.index_mask
    old_entries = page.entries[index : index + piece.cluster_count]
    if not any(old_entries) and is_wanted(piece.offset, piece.offset + piece.cluster_count * size):
        return _publish_whole(metadata, page, piece)  # nearly always, and guests wait for this
    entries = old_entries.tolist()
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


def _publish_whole(metadata: Metadata, page: Page, piece: Piece) -> FillCounts:
    mapping, (offset, count, host_offset) = metadata.mapping, piece
    if host_offset is None:
        entries = [ZERO] * count
    else:
        size = metadata.header.cluster_size
        entries = list(range(host_offset, host_offset + count * size, size))
    index = (offset >> mapping.cluster_bits) & mapping.index_mask
    mapping.set_entries(offset >> mapping.page_bits, page, index, entries)
    return FillCounts(0, count, 0) if host_offset is None else FillCounts(count, 0, 0)
