"""Copying in another process while guests are at work, to places in the file that are taken up front.

A place is taken before anybody has looked for zeroes. Clusters with anything else go there, one right behind
the other; what a copy leaves of its place goes back, and one that has too little goes on elsewhere. Guests'
writes do not share the places, so that they need not wait for the copies. How it has such places is a
format's own business.
"""

import asyncio
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from blockd.block.file_events import FileEvent
from blockd.block.node import OverlayNode
from blockd.block.segments import SourcePlan
from blockd.block.zero_clusters import packed_end
from blockd.formats.copying import Part, Target
from blockd.formats.publishing import Piece


class Place(NamedTuple):
    """Neighbouring clusters in the file that are a copy's until it is over."""

    host_offset: int
    length: int


class CopyPlaces(Protocol):
    """How an image has places for copies."""

    async def allocate(self, length: int) -> Place | None:
        """Take a place for a copy of so many bytes, perhaps too small; None: there is none."""

    def finish(self, place: Place, stored_length: int, length: int) -> None:
        """A copy of `length` bytes is over, of which so many were stored: give back what is behind them.

        A `length` of 0: it has failed, and may have written anywhere in its place.
        """


class ApartCopies:
    """The copies of one fill that another process makes; `pieces`: takes note of what was copied where."""

    def __init__(
        self,
        image: OverlayNode,
        target: Target,
        source: SourcePlan,
        places: CopyPlaces,
        pieces: list[Piece],
    ) -> None:
        self._image = image
        self._target = target
        self._source = source
        self._places = places
        self._pieces = pieces

    async def copy(self, part: Part, length: int) -> int:
        """Copy the first bytes of a part; tells from which position on it is left to threads."""
        position = 0
        while position < length and self._image.copies_apart and not self._target.keep_cached:
            await asyncio.sleep(0)  # guests have their turn: getting here took as long as a request
            rest = Part.at(list(part.guest_ranges(position, length - position)), 0)
            self._target.file.announce(FileEvent.CLUSTER_ALLOC)
            place = await self._places.allocate(rest.length)
            if place is None:
                break
            copied_length = await self._copy_to(place, rest)
            if not copied_length:
                break
            position += copied_length
        return position

    async def _copy_to(self, place: Place, part: Part) -> int:
        """Copy as much as there is place for; tells how much that is. 0: nothing can be."""
        stored_length = length = 0
        cluster_size = self._target.cluster_size
        try:
            zeroes = await self._target.file.copy_apart(
                self._source.gathered(part.ranges).segments,
                place.host_offset,
                part.length,
                cluster_size,
                place.length,
            )
            if zeroes is not None:
                length = packed_end(part.length, zeroes, cluster_size, place.length)
                stored_length = self._note_packed(part, length, place.host_offset, zeroes)
            return length
        finally:
            self._places.finish(place, stored_length, length)

    def _note_packed(self, part: Part, length: int, host_offset: int, zeroes: list[int]) -> int:
        """Note what was copied of a part, one right behind the other; tells how much."""
        cluster_size = self._target.cluster_size
        position = stored = 0
        for zero in [*zeroes, length]:
            if position < zero:
                places = pieces_of(part, position, zero - position, host_offset + stored, cluster_size)
                self._pieces.extend(places)
                stored += zero - position
            if zero < length:
                self._pieces.extend(pieces_of(part, zero, cluster_size, None, cluster_size))
            position = zero + cluster_size
        return stored


def pieces_of(
    part: Part, position: int, length: int, host_offset: int | None, cluster_size: int
) -> Iterator[Piece]:
    """The pieces of a stretch of a part that is copied to neighbours in the file; None: it is zeroes."""
    for start, end in part.guest_ranges(position, length):
        yield Piece(start, (end - start) // cluster_size, host_offset)
        if host_offset is not None:
            host_offset += end - start
