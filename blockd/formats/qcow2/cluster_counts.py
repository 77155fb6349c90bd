"""A number for each host cluster of a file, in memory that grows only with what is not 0.

Numbers past `COUNT_MAX` are kept as that: no sound image has them. A file that would need more memory
than `COUNTS_SIZE_MAX` in all is refused; that is one of 3 TiB with 64 KiB clusters, all of them in use.
"""

from array import array
from collections.abc import Iterator

from blockd.errors import ImageError
from blockd.units import MIB, format_size

COUNT_MAX = 0xFFFF
COUNTS_SIZE_MAX = 192 * MIB

_TYPECODE = "H"
_SPAN = 1024  # clusters counted in one piece
_PIECE_SIZE = 2 * _SPAN
_NOTHING = array(_TYPECODE, bytes(_PIECE_SIZE))


class CountsBudget:
    """The memory that all counts for one file may take together."""

    def __init__(self, filename: str, size_max: int = COUNTS_SIZE_MAX) -> None:
        self._filename = filename
        self._size_max = size_max
        self._size = 0

    def take(self, size: int) -> None:
        """Account for memory that is about to be used.

        Raises:   ImageError: it would be too much.
        """
        self._size += size
        if self._size > self._size_max:
            raise ImageError(
                f"'{self._filename}' cannot be checked in {format_size(self._size_max)} of memory: "
                "too many of its clusters are in use"
            )


class ClusterCounts:
    """How often something is said of each cluster."""

    def __init__(self, budget: CountsBudget) -> None:
        self._budget = budget
        self._pieces: dict[int, array[int]] = {}

    def __getitem__(self, cluster: int) -> int:
        piece = self._pieces.get(cluster // _SPAN)
        return piece[cluster % _SPAN] if piece is not None else 0

    def add(self, cluster: int, times: int = 1) -> None:
        """Count one cluster; with -1 take back what was counted."""
        piece, index = self._piece(cluster // _SPAN), cluster % _SPAN
        piece[index] = min(piece[index] + times, COUNT_MAX)

    def add_range(self, first: int, count: int, times: int = 1) -> None:
        """Count neighbouring clusters."""
        for number, start, stop in _parts(first, count):
            piece = self._piece(number)
            if piece[start:stop] == _NOTHING[start:stop]:
                piece[start:stop] = array(_TYPECODE, [min(times, COUNT_MAX)]) * (stop - start)
            else:
                for index in range(start, stop):
                    piece[index] = min(piece[index] + times, COUNT_MAX)

    def put(self, first: int, values: "array[int]") -> None:
        """Set the numbers of neighbouring clusters."""
        position = 0
        for number, start, stop in _parts(first, len(values)):
            part = values[position : position + stop - start]
            position += stop - start
            if any(part):
                if part.itemsize > 2:
                    part = array(_TYPECODE, [min(value, COUNT_MAX) for value in part])
                self._piece(number)[start:stop] = array(_TYPECODE, part)

    def get(self, first: int, count: int) -> "array[int]":
        """The numbers of neighbouring clusters."""
        values = array(_TYPECODE)
        for number, start, stop in _parts(first, count):
            values += self._pieces.get(number, _NOTHING)[start:stop]
        return values

    def are_all(self, first: int, count: int, value: int) -> bool:
        """Whether the numbers of all neighbouring clusters are `value`."""
        return self.get(first, count) == array(_TYPECODE, [value]) * count

    def clusters(self) -> Iterator[tuple[int, int]]:
        """All clusters whose number is not 0, in order, with the number."""
        for number in sorted(self._pieces):
            for index, value in enumerate(self._pieces[number]):
                if value:
                    yield number * _SPAN + index, value

    def ranges_with(self, other: "ClusterCounts") -> Iterator[range]:
        """Ranges of clusters, in order, outside of which both have nothing but 0."""
        for number in sorted(self._pieces.keys() | other._pieces.keys()):
            yield range(number * _SPAN, (number + 1) * _SPAN)

    def ranges_not_as(self, other: "ClusterCounts") -> Iterator[range]:
        """Ranges of clusters, in order, outside of which both say the same."""
        for clusters in self.ranges_with(other):
            number = clusters.start // _SPAN
            if self._pieces.get(number, _NOTHING) != other._pieces.get(number, _NOTHING):
                yield clusters

    def find_zero(self, start: int) -> int:
        """The first cluster from `start` on whose number is 0."""
        number, index = divmod(start, _SPAN)
        while (piece := self._pieces.get(number)) is not None:
            rest = piece[index:]
            if 0 in rest:
                return number * _SPAN + index + rest.index(0)
            number, index = number + 1, 0
        return number * _SPAN + index

    def used_spans(self, span: int) -> Iterator[int]:
        """The numbers of the stretches of `span` clusters, a power of two, that are not all 0; in order."""
        last = -1
        step = min(span, _SPAN)
        for number in sorted(self._pieces):
            for start in range(0, _SPAN, step):
                found = (number * _SPAN + start) // span
                if found != last and self._pieces[number][start : start + step] != _NOTHING[:step]:
                    last = found
                    yield found

    def last(self) -> int:
        """The last cluster whose number is not 0; -1 if there is none."""
        for number in sorted(self._pieces, reverse=True):
            piece = self._pieces[number]
            for index in range(_SPAN - 1, -1, -1):
                if piece[index]:
                    return number * _SPAN + index
        return -1

    def _piece(self, number: int) -> "array[int]":
        piece = self._pieces.get(number)
        if piece is None:
            self._budget.take(_PIECE_SIZE)
            piece = self._pieces[number] = _NOTHING[:]
        return piece


def _parts(first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Cut a range of clusters into (piece, start in it, stop in it)."""
    end = first + count
    while first < end:
        number, start = divmod(first, _SPAN)
        stop = min(_SPAN, start + end - first)
        yield number, start, stop
        first += stop - start
