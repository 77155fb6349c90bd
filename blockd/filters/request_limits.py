"""In what pieces requests come to a file: as those of a disk with sectors and limits of its own would.

Requests are widened to whole blocks of `align` bytes (discards are narrowed), and cut into pieces. Zeroes are
for whole units only: what is left of them at both ends is written as data.

Source:   QEMU documentation, QMP reference, "BlockdevOptionsBlkdebug".
"""

from collections.abc import Iterator
from typing import NamedTuple

from blockd.extents import Range
from blockd.units import align_down, align_up


class RequestLimits(NamedTuple):
    """Sizes in bytes; 0: no such limit."""

    align: int = 1
    max_transfer: int = 0
    opt_write_zero: int = 0
    max_write_zero: int = 0
    opt_discard: int = 0
    max_discard: int = 0

    def transfers(self, offset: int, length: int) -> Iterator[Range]:
        """The pieces in which a range is read or written, widened to whole blocks."""
        start, end = align_down(offset, self.align), align_up(offset + length, self.align)
        return _pieces(start, end, self.max_transfer)

    def partial_blocks(self, offset: int, length: int) -> list[int]:
        """Which blocks a write covers in part at its head and at its tail, and has to read before."""
        end = offset + length
        found = [align_down(offset, self.align)] if offset % self.align else []
        if end % self.align and align_down(end, self.align) not in found:
            found.append(align_down(end, self.align))
        return found

    def whole_zeroes(self, offset: int, length: int) -> Range:
        """The part of a range that consists of whole units of zeroes, maybe empty."""
        return _whole(offset, length, max(self.opt_write_zero, self.align))

    def zeroes(self, start: int, end: int) -> Iterator[Range]:
        """The pieces in which `whole_zeroes` are written."""
        return _pieces(start, end, align_down(self.max_write_zero, max(self.opt_write_zero, self.align)))

    def discards(self, offset: int, length: int) -> Iterator[Range]:
        """The pieces in which the whole blocks of a range are discarded, cut where units begin and end."""
        unit = max(self.opt_discard, self.align)
        start, end = _whole(offset, length, self.align)
        units_start = min(end, align_up(start, unit))
        units_end = max(units_start, align_down(end, unit))
        yield from _pieces(start, units_start, 0)
        yield from _pieces(units_start, units_end, align_down(self.max_discard, unit))
        yield from _pieces(units_end, end, 0)


def _whole(offset: int, length: int, unit: int) -> Range:
    start = align_up(offset, unit)
    return start, max(start, align_down(offset + length, unit))


def _pieces(start: int, end: int, length_max: int) -> Iterator[Range]:
    while start < end:
        piece_end = min(end, start + length_max) if length_max else end
        yield start, piece_end
        start = piece_end
