"""Maps: what kind of data a range of a disk holds, as runs; and sets of ranges."""

import enum
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Start and end.
Range = tuple[int, int]


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


def total_length(ranges: Iterable[Range]) -> int:
    """How much some ranges are together."""
    return sum(end - start for start, end in ranges)


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


class RangeSet:
    """Ranges that may be asked for in a few steps, however many there are; they are kept joined, in order."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __iter__(self) -> Iterator[Range]:
        return zip(self._starts, self._ends, strict=True)

    def add(self, start: int, end: int) -> None:
        """Have all of a range in it; an empty one adds nothing."""
        if start >= end:
            return
        if not self._ends or start > self._ends[-1]:  # nearly always
            self._starts.append(start)
            self._ends.append(end)
            return
        low, high = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if low < high:
            start, end = min(start, self._starts[low]), max(end, self._ends[high - 1])
        self._starts[low:high], self._ends[low:high] = [start], [end]

    def touches(self, start: int, end: int) -> bool:
        """Whether any byte of a range is in it."""
        index = bisect_right(self._ends, start)
        return index < len(self._starts) and self._starts[index] < end

    def clipped(self, start: int, end: int) -> Iterator[Range]:
        """What of it is in a range."""
        for index in range(bisect_right(self._ends, start), bisect_left(self._starts, end)):
            yield max(start, self._starts[index]), min(end, self._ends[index])
