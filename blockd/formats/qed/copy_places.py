"""Where copies go that another process makes: places at the end of the file, one after the other.

QED keeps no list of free clusters, so none should be left amid others when the copying is over. What a copy
leaves of its place is cut off at the end of the file, unless a guest has got clusters behind it meanwhile:
therefore a place is not larger than what was copied lately makes one expect, and only one is taken at a time.
"""

import asyncio

from blockd.formats.copying_apart import Place
from blockd.formats.density import Density
from blockd.formats.qed.allocator import Allocator, Run
from blockd.units import align_down


class CopyPlaces:
    """Places for copies into one image.

    Locks:    `taking` is held by who has a place, and by other copies that allocate meanwhile.
    """

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self._cluster_size = allocator.cluster_size
        self.density = Density()
        self.taking = asyncio.Lock()

    async def allocate(self, length: int) -> Place | None:
        """Do what `formats.copying_apart.CopyPlaces` promises.

        Needs:    `taking` is held.
        """
        folio, expected = self._allocator.folio_length, self.density.expected(length)
        if length < folio:
            return None  # a thread has it copied as soon
        if expected < length:
            length = min(length, max(folio, align_down(expected, folio)))
        run = self._allocator.take_place(length)
        return Place(run.host_offset, run.cluster_count * self._cluster_size)

    def finish(self, place: Place, stored_length: int, length: int) -> None:
        """Do what `formats.copying_apart.CopyPlaces` promises."""
        if length:
            self.density.note(stored_length, length)
        run = Run(place.host_offset, place.length // self._cluster_size)
        self._allocator.finish_place(run, stored_length // self._cluster_size, is_rest_fresh=length > 0)
