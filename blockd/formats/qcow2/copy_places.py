"""Where copies go that another process makes: places in the file that guests' writes do not share.

A place is taken before anybody has looked for zeroes, so it is as large as what was copied lately makes one
expect, and not larger: a copy that has too little goes on elsewhere. Of what it leaves, whole folios are free
again; the rest of its last one is kept for the next copy, or each of them would make the file longer by a
folio.
"""

from blockd.formats.copying_apart import Place
from blockd.formats.density import Density
from blockd.formats.qcow2.allocator import Allocator
from blockd.formats.qcow2.runs import Run
from blockd.units import align_down, align_up

# How many rests are kept, and how small a part of a folio is worth a copy.
REST_COUNT_MAX = 16
REST_SHARE_MIN = 8


class CopyPlaces:
    """Places for copies into one image."""

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self._rests: list[Run] = []
        self.density = Density()

    async def allocate(self, length: int) -> Place | None:
        """Do what `formats.copying_apart.CopyPlaces` promises."""
        run = await self._allocate(length)
        if run is None:
            return None
        return Place(run.host_offset, run.cluster_count << self._allocator.cluster_bits)

    async def _allocate(self, length: int) -> Run | None:
        allocator, folio = self._allocator, self._allocator.folio_clusters
        while self._rests:
            rest = self._rests.pop()
            if allocator.allocate_withheld(rest):
                return rest
        expected = self.density.expected(length)
        aligned = align_up if expected == length else align_down
        return await allocator.allocate_folios(max(folio, aligned(expected >> allocator.cluster_bits, folio)))

    def finish(self, place: Place, stored_length: int, length: int) -> None:
        """Do what `formats.copying_apart.CopyPlaces` promises."""
        if length:
            self.density.note(stored_length, length)
        if stored_length < place.length:
            count = (place.length - stored_length) >> self._allocator.cluster_bits
            self._give_back(Run(place.host_offset + stored_length, count))

    def _give_back(self, run: Run) -> None:
        allocator, folio = self._allocator, self._allocator.folio_clusters
        allocator.give_back(run)
        rest = run._replace(
            cluster_count=min(run.cluster_count, -(run.host_offset >> allocator.cluster_bits) % folio)
        )
        is_worth_it = rest.cluster_count * REST_SHARE_MIN >= folio and len(self._rests) < REST_COUNT_MAX
        if rest.cluster_count and is_worth_it and allocator.withhold(rest):
            self._rests.append(rest)

    def give_up(self) -> None:
        """Nothing is kept any more: the rests may be used for anything."""
        rests, self._rests = self._rests, []
        self._allocator.release(rests)
