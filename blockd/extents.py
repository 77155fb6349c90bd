"""Maps: what kind of data a range of a disk holds, as runs."""

import enum
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Kind(enum.Enum):
    """What one layer has for a range."""

    DATA = "data"  # bytes are stored in this layer
    ZERO = "zero"  # this layer says: zeroes
    UNALLOCATED = "unallocated"  # this layer has nothing: the backing decides, zeroes without one


class Extent(NamedTuple):
    """A contiguous range of one kind."""

    offset: int
    length: int
    kind: Kind

    @property
    def end(self) -> int:
        return self.offset + self.length


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours of the same kind.

    Shape:    extents in order, none empty, neighbours differ in kind.
    Needs:    extents in order and without gaps.
    """
    last: Extent | None = None
    for extent in extents:
        if last is not None and last.kind is extent.kind:
            last = Extent(last.offset, last.length + extent.length, last.kind)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last
