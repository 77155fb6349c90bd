"""Filling: how a stream or copy-on-read puts data where the image holds nothing yet.

A thread reads and finds zeroes; what is left gets clusters that nothing names, and a thread writes there.
Only then is the map changed, cluster by cluster, where the cluster is still empty and still wanted. A guest
write that comes meanwhile therefore never waits for a copy, and a copy never overwrites one.

No cluster is allocated for what is then not stored: a table that is allocated meanwhile would stay behind it.
Where no zeroes were found for a while none are expected, and one thread hop does it all.
While guests are at work, what is written past the page cache goes to folios of its own
(`Allocator.allocate_folios`), so that their writes, and those of tables, do not wait for it; the rest goes
through the cache.
"""

import contextlib
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from blockd.aio import in_thread
from blockd.block.accounting import all_guests
from blockd.block.copy_memory import LENGTH
from blockd.block.file_events import FileEvent
from blockd.block.node import FillCounts, IsWanted
from blockd.block.segments import SourcePlan
from blockd.extents import Range, total_length
from blockd.formats.copying import (
    Copy,
    CopyRun,
    Part,
    Target,
    append_run,
    empty_ranges,
    source_reader,
    split_zeroes,
)
from blockd.formats.copying_apart import ApartCopies, pieces_of
from blockd.formats.publishing import GiveBack, Layout, Piece, give_back_pieces, publish_pieces
from blockd.formats.qcow2.mapping import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from blockd.formats.qcow2.metadata import Metadata
from blockd.formats.qcow2.runs import Run

if TYPE_CHECKING:
    from blockd.formats.qcow2.image import Qcow2Image


async def fill(
    image: "Qcow2Image",
    ranges: Sequence[Range],
    source: SourcePlan,
    is_wanted: IsWanted,
    *,
    keep_cached: bool,
) -> FillCounts:
    """Do what `OverlayNode.fill` promises."""
    metadata = image.metadata
    await metadata.relieve()
    filling = _Filling(image, source, keep_cached=keep_cached)
    try:
        stored: list[Range] = []
        for start, end, is_zero in split_zeroes(image, await empty_ranges(image, ranges), source):
            if is_zero and filling.stores_no_zeroes:
                filling.note_zeroes(start, end)
            else:
                stored.append((start, end))
        image.file.announce(FileEvent.COR_WRITE)
        await filling.copy(stored)
    except BaseException:
        give_back_pieces(filling.pieces, _giving_back(metadata))
        raise
    return await _publish(image, sorted(filling.pieces, key=itemgetter(0)), is_wanted)


class _Place(NamedTuple):
    """Where in the file a part of a run of copies goes; `is_shared`: with guests, through the page cache."""

    run: CopyRun
    host_offset: int
    is_shared: bool


class _Filling:
    """One fill: what was copied so far, to clusters that are given back unless they come into the map."""

    def __init__(self, image: "Qcow2Image", source: SourcePlan, *, keep_cached: bool) -> None:
        self.pieces: list[Piece] = []
        self._image = image
        self._metadata = image.metadata
        self._cluster_bits = image.metadata.header.cluster_bits
        self._target = Target(image.file, image.cluster_size, keep_cached)
        self._source = source
        # Whether zeroes take no space: the map can say that they are some, or need not.
        self.stores_no_zeroes = image.metadata.knows_zero or not image.records_zeroes

    def note_zeroes(self, start: int, end: int) -> None:
        """A range of whole clusters is to be zeroes."""
        self.pieces.append(Piece(start, (end - start) >> self._cluster_bits, None))

    def _note(self, part: Part, position: int, length: int, host_offset: int | None) -> None:
        """A stretch of a part is copied to neighbours in the file, or is zeroes."""
        self.pieces.extend(pieces_of(part, position, length, host_offset, self._image.cluster_size))

    async def copy(self, ranges: list[Range]) -> None:
        """Copy ranges of whole clusters."""
        length = total_length(ranges)
        whole = Part.at(ranges, 0)
        apart = ApartCopies(self._image, self._target, self._source, self._metadata.copy_places, self.pieces)
        position = await apart.copy(whole, length)
        length_max = max(LENGTH, self._image.cluster_size)
        for start in range(position, length, length_max):
            count = min(length_max, length - start)
            await self._copy_part(Part.at(list(whole.guest_ranges(start, count)), 0))

    # -- by threads ---------------------------------------------------------------------------

    async def _copy_part(self, part: Part) -> None:
        source = self._source.gathered(part.ranges)
        read = await source_reader(source)
        expected, noted_count = [CopyRun(0, part.length)], len(self.pieces)
        with contextlib.ExitStack() as held:
            ahead = await self._places(part, expected) if self._metadata.copy_places.density.is_full else []

            def copy_blocking() -> tuple[Copy, list[CopyRun]]:
                copy, runs = Copy.read_whole_blocking(self._target, held, source, read, part.length)
                if runs == expected:
                    self._write_blocking(copy, ahead)
                return copy, runs

            copy, runs = await in_thread(copy_blocking)
            self._metadata.copy_places.density.note(
                sum(run.end - run.start for run in runs if not run.is_zero), part.length
            )
            if not ahead or runs != expected:
                give_back_pieces(self.pieces[noted_count:], _giving_back(self._metadata))
                del self.pieces[noted_count:]
                await self._store(part, copy, runs)

    async def _store(self, part: Part, copy: Copy, runs: list[CopyRun]) -> None:
        """Allocate for what was read, and write it."""
        stored: list[CopyRun] = []
        for run in runs:
            if run.is_zero and self.stores_no_zeroes:
                self._note(part, run.start, run.end - run.start, None)
            else:
                append_run(stored, run._replace(is_zero=False))  # what the map cannot say is data
        if stored:
            await in_thread(self._write_blocking, copy, await self._places(part, stored))

    def _write_blocking(self, copy: Copy, places: list[_Place]) -> None:
        shared = copy._replace(target=self._target._replace(keep_cached=True))
        for run, host_offset, is_shared in places:
            (shared if is_shared else copy).store_blocking(run, host_offset)

    async def _places(self, part: Part, runs: list[CopyRun]) -> list[_Place]:
        """Allocate for runs, in as few pieces as there are."""
        places: list[_Place] = []
        free, is_shared = Run(0, 0), False
        left = sum(run.end - run.start for run in runs) >> self._cluster_bits
        for run in runs:
            start = run.start
            while start < run.end:
                if not free.cluster_count:
                    free, is_shared = await self._allocate(left)
                    left -= free.cluster_count
                count = min(free.cluster_count, (run.end - start) >> self._cluster_bits)
                length = count << self._cluster_bits
                self._note(part, start, length, free.host_offset)
                places.append(
                    _Place(run._replace(start=start, end=start + length), free.host_offset, is_shared)
                )
                free = Run(free.host_offset + length, free.cluster_count - count)
                start += length
        return places

    async def _allocate(self, cluster_count: int) -> tuple[Run, bool]:
        """Allocate neighbouring clusters; tells whether guests may write beside them."""
        if not all_guests.are_at_work:
            return await self._metadata.allocate(cluster_count), False
        run = await self._allocate_folios(cluster_count)
        if run is not None:
            return run, False
        cluster_count = min(cluster_count, max(1, self._metadata.allocator.folio_clusters - 1))
        return await self._metadata.allocate(cluster_count), True

    async def _allocate_folios(self, cluster_count: int) -> Run | None:
        self._image.file.announce(FileEvent.CLUSTER_ALLOC)
        return await self._metadata.allocator.allocate_folios(cluster_count)


def _giving_back(metadata: Metadata) -> GiveBack:
    return lambda host_offset, cluster_count: metadata.allocator.give_back(Run(host_offset, cluster_count))


# -- publishing -------------------------------------------------------------------------------


async def _publish(image: "Qcow2Image", pieces: list[Piece], is_wanted: IsWanted) -> FillCounts:
    """Put the copies into the map; what is not published is given back."""
    metadata, mapping = image.metadata, image.metadata.mapping

    async def publish(pieces: list[Piece]) -> FillCounts:
        await metadata.writable_table(pieces[0].offset >> mapping.table_bits)
        return _publish_pieces(metadata, pieces, is_wanted)

    layout = Layout(mapping.cluster_bits, mapping.table_bits, image.records_zeroes)
    return await publish_pieces(pieces, layout, publish, _giving_back(metadata))


def _publish_pieces(metadata: Metadata, pieces: list[Piece], is_wanted: IsWanted) -> FillCounts:
    """Publish pieces that one table in memory maps."""
    mapping, size = metadata.mapping, metadata.header.cluster_size
    l1_index = pieces[0].offset >> mapping.table_bits
    table, entries = mapping.tables[l1_index], mapping.tables[l1_index].entries
    last_end = pieces[-1].offset + pieces[-1].cluster_count * size
    is_plain = is_wanted(pieces[0].offset, last_end)
    counts = FillCounts(0, 0, 0)
    copied = 0
    for piece in pieces:
        offset, count, host_offset = piece
        index = (offset >> mapping.cluster_bits) & mapping.index_mask
        if host_offset is None or not is_plain or any(entries[index : index + count]):
            done = _publish_piece(metadata, piece, is_wanted)
            counts = FillCounts(*map(sum, zip(counts, done, strict=True)))
            continue
        first = host_offset | COPIED  # so are nearly all of many
        if count == 1:
            mapping.set_entry(l1_index, table, index, first)
        else:
            mapping.set_entries(l1_index, table, index, range(first, first + count * size, size))
        copied += count
    return counts._replace(copied=counts.copied + copied)


def _publish_piece(metadata: Metadata, piece: Piece, is_wanted: IsWanted) -> FillCounts:
    """Publish a piece that one table in memory maps."""
    mapping, size = metadata.mapping, metadata.header.cluster_size
    l1_index = piece.offset >> mapping.table_bits
    table = mapping.tables[l1_index]
    index = (piece.offset >> mapping.cluster_bits) & mapping.index_mask
    entries = table.entries[index : index + piece.cluster_count]
    offsets = range(piece.offset, piece.offset + piece.cluster_count * size, size)
    is_as_planned = is_wanted(offsets.start, offsets.stop) and not any(entries)
    if piece.host_offset is not None and is_as_planned:  # nearly always, and guests wait for this
        first = piece.host_offset | COPIED
        mapping.set_entries(l1_index, table, index, range(first, first + len(offsets) * size, size))
        return FillCounts(piece.cluster_count, 0, 0)
    dropped = 0
    for number, (offset, old) in enumerate(zip(offsets, entries, strict=True)):
        host_offset = None if piece.host_offset is None else piece.host_offset + number * size
        if not old & (OFFSET_MASK | COMPRESSED | ZERO) and is_wanted(offset, offset + size):
            entries[number] = ZERO if host_offset is None else host_offset | COPIED
            continue
        dropped += 1
        if host_offset is not None:
            metadata.allocator.give_back(Run(host_offset, 1))
    mapping.set_entries(l1_index, table, index, entries)
    stored = piece.cluster_count - dropped
    return FillCounts(0, stored, dropped) if piece.host_offset is None else FillCounts(stored, 0, dropped)
