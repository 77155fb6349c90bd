"""Looking at a range through many layers at once: their labels, laid on top of each other.

Each layer tells its part of a chain's map as a string with one label for each unit of the range:

    -    nothing: the layer below decides
    0    reads as zeroes
    D d  stored; d: right behind the unit before
    C c  compressed; c: in the same cluster as the unit before

A layer's string shows through where those above have nothing. Such strings are merged as large integers, and
a regular expression finds the runs: no step in Python is made for a unit that is like the one before.
"""

import re
from collections.abc import Sequence
from functools import cache
from itertools import islice
from operator import sub
from typing import Final, NamedTuple

from blockd.aio import Turns
from blockd.block.node import BlockNode, FilterNode, Labelled, OverlayNode, Segment
from blockd.extents import Extent, Kind
from blockd.units import align_down

# How many layers are laid on top of each other; what is below shows through to the next look.
LAYER_COUNT_MAX: Final = 48
# How many runs one look tells at most, so that nobody waits for it for more than a millisecond or so.
RUN_COUNT_MAX: Final = 1024

_NOTHING: Final = 0
_LABELS: Final = b"DdCc0"
_D, _, _C, _, _ZERO = range(1, 6)
# What shows the layers below: where there is nothing.
_HOLES: Final = bytes([0xFF]) + bytes(255)
_KIND_TABLE: Final = bytes.maketrans(b"-0DdCc", bytes([_NOTHING, _ZERO, _D, _D, _D, _D]))
_KIND_RUNS: Final = re.compile(rb"\x00+|\x01+|\x05+")
_KIND_OF: Final = {_NOTHING: Kind.UNALLOCATED, _D: Kind.DATA, _ZERO: Kind.ZERO}


def _code_table(depth: int) -> bytes:
    """Makes of the labels of a layer codes that no other layer has."""
    codes = bytes(len(_LABELS) * depth + number for number in range(1, len(_LABELS) + 1))
    return bytes.maketrans(b"-" + _LABELS, bytes([_NOTHING]) + codes)


# By code: the number of the layer, and whether it says zeroes.
_OWNERS: Final = [(None, False)] + [
    (number // len(_LABELS), number % len(_LABELS) == _ZERO - 1)
    for number in range(len(_LABELS) * LAYER_COUNT_MAX)
]
_CODE_TABLES: Final = [_code_table(depth) for depth in range(LAYER_COUNT_MAX)]

# There are very many runs: a named tuple's own constructor takes three times as long.
_new: Final = tuple.__new__


@cache
def _placed_runs(depth: int) -> "re.Pattern[bytes]":
    """Finds the runs of codes of so many layers."""
    patterns = [rb"\x00+"]
    for first in range(1, len(_LABELS) * depth + 1, len(_LABELS)):
        d, d_next, c, c_next, zero = (rb"\x%02x" % code for code in range(first, first + len(_LABELS)))
        patterns += [b"[%b%b]%b*" % (d, d_next, d_next), b"[%b%b]%b*" % (c, c_next, c_next), zero + b"+"]
    return re.compile(b"|".join(patterns))


def _following(code: int) -> int:
    """The code of further units of a cluster whose first unit has this one."""
    return code + 1 if code and (code - 1) % len(_LABELS) + 1 in (_D, _C) else code


class Run(NamedTuple):
    """A part of the range that one layer has in one place, or that no layer has (`layer` None)."""

    offset: int
    length: int
    layer: int | None
    is_zero: bool


class _Codes(NamedTuple):
    """Merged labels: of which layer what is seen, for units from `start` on; unit 0: one for all."""

    codes: bytes
    unit: int
    start: int


class Look:
    """What some layers together hold of a range from `offset` to `end`."""

    def __init__(self, offset: int, end: int, *, with_places: bool) -> None:
        self.offset = offset
        self.end = end
        # From the top down; what each has told.
        self.layers: list[tuple[BlockNode, Labelled]] = []
        # Where to look on for what none of them holds; None: there is nothing any more.
        self.rest: BlockNode | None = None
        self._with_places = with_places
        self._codes = _Codes(bytes([_NOTHING]), 0, offset)

    @property
    def shows_below(self) -> bool:
        """Whether the layers so far lack anything."""
        return _NOTHING in self._codes.codes

    def add(self, node: BlockNode, told: Labelled) -> None:
        """Lay what the next layer says below the others."""
        table = _CODE_TABLES[len(self.layers)] if self._with_places else _KIND_TABLE
        self.layers.append((node, told))
        self.end = min(self.end, told.end)
        above, below = self._codes, _Codes(told.labels.translate(table), told.unit, told.start)
        units = [codes.unit for codes in (above, below) if codes.unit]
        if not units:
            self._codes = above if above.codes[0] else below
            return
        unit = min(units)
        start = align_down(self.offset, unit)
        count = (self.end - 1 - start) // unit + 1
        upper, lower = (self._fitted(codes, unit, start, count) for codes in (above, below))
        holes = int.from_bytes(upper.translate(_HOLES), "little")
        merged = int.from_bytes(upper, "little") | int.from_bytes(lower, "little") & holes
        self._codes = _Codes(merged.to_bytes(count, "little"), unit, start)

    def _fitted(self, told: "_Codes", unit: int, start: int, count: int) -> bytes:
        """So many codes of units that are not larger, from another start on."""
        codes = told.codes
        if not told.unit:
            return self._spread(codes, count)
        if told.unit > unit:
            codes = self._spread(codes, told.unit // unit)
        first = (start - told.start) // unit
        return codes[first : first + count]

    def _spread(self, codes: bytes, factor: int) -> bytes:
        """Codes of units of which each is divided into `factor`."""
        following = _following if self._with_places else int
        spread = {code: bytes([code]) + bytes([following(code)]) * (factor - 1) for code in set(codes)}
        return b"".join(map(spread.__getitem__, codes))

    def _runs(self) -> tuple[list[int], list[int]]:
        """The code of each run, and where it begins; the last of the offsets is where the last one ends."""
        codes, unit, start = self._codes
        if not unit:
            return [codes[0]], [self.offset, self.end]
        pattern = _placed_runs(len(self.layers)) if self._with_places else _KIND_RUNS
        ends = [match.end() for match in islice(pattern.finditer(codes), RUN_COUNT_MAX)]
        offsets = [self.offset, *[start + number * unit for number in ends]]
        self.end = offsets[-1] = min(offsets[-1], self.end)
        return [codes[0], *map(codes.__getitem__, ends[:-1])], offsets

    def extents(self) -> list[Extent]:
        """The kinds of the runs; UNALLOCATED: in none of the layers."""
        codes, offsets = self._runs()
        kinds = map(_KIND_OF.__getitem__, codes)
        return list(map(Extent, offsets, map(sub, offsets[1:], offsets), kinds))

    def runs(self) -> list[Run]:
        """The runs, with the number of the layer that has each."""
        codes, offsets = self._runs()
        owners = map(_OWNERS.__getitem__, codes)
        return [
            _new(Run, (offset, end - offset, layer, is_zero))
            for offset, end, (layer, is_zero) in zip(offsets, offsets[1:], owners, strict=False)
        ]

    async def segments(self, runs: Sequence[Run]) -> list[Segment | None]:
        """Where the runs are stored; None: in none of the layers."""
        found: list[Segment | None] = [None] * len(runs)
        numbers: list[list[int]] = [[] for _ in self.layers]
        for number, (_, _, layer, _) in enumerate(runs):
            if layer is not None:
                numbers[layer].append(number)
        for (node, told), of_layer in zip(self.layers, numbers, strict=True):
            placed = await node.place(told, [runs[number][:2] for number in of_layer]) if of_layer else ()
            for number, segment in zip(of_layer, placed, strict=True):
                found[number] = segment
        return found


def kinds_told(node: BlockNode, told: Labelled, offset: int) -> list[Extent]:
    """The kinds of what one layer has told from `offset` on, as `BlockNode.map`."""
    look = Look(offset, told.end, with_places=False)
    look.add(node, told)
    return look.extents()


async def look_through(
    node: BlockNode,
    base: BlockNode | None,
    offset: int,
    length: int,
    *,
    with_places: bool = False,
    with_holes: bool = True,
) -> Look | None:
    """Look at a range in the layers from `node` down to, not including, `base`.

    Filters are passed by, but not `with_places`: what is read comes through them. `with_holes`: holes of
    files count as zeroes, and the filesystem is asked for them.

    The look may stop before the end of the range. None: `node` has no labels.
    """
    look, turns = Look(offset, offset + length, with_places=with_places), Turns()
    below: BlockNode | None = node
    while below is not None and len(look.layers) < LAYER_COUNT_MAX:
        while isinstance(below, FilterNode) and not with_places:
            below = below.child
        if below is base or offset >= below.size or not look.shows_below:
            break
        told = await below.labels(
            offset, min(look.end, below.size) - offset, with_places=with_places, with_holes=with_holes
        )
        if told is None:
            break
        # Of now: what the labels tell is true of the layer below then, also when there is another one later.
        next_below = below.backing
        look.add(below, told)
        if next_below is not None and look.shows_below and isinstance(below, OverlayNode) and with_places:
            below.announce_backing_read()
        below = next_below
        await turns.pass_on()
    look.rest = below
    return look if look.layers else None


async def plan_through(node: BlockNode, offset: int, length: int) -> list[Segment]:
    """Tell where the bytes of a range are stored; as `BlockNode.plan_read`, for `node` with labels."""
    segments: list[Segment] = []
    end = offset + length
    turns = Turns()
    while offset < end:
        look = await look_through(node, None, offset, end - offset, with_places=True, with_holes=False)
        assert look is not None, "a node that plans so has labels"
        runs = look.runs()
        for run, segment in zip(runs, await look.segments(runs), strict=True):
            if segment is not None:
                segments.append(segment)
            else:
                segments += await _plan_rest(look.rest, run.offset, run.length)
        offset = look.end
        await turns.pass_on()
    return segments


async def _plan_rest(node: BlockNode | None, offset: int, length: int) -> list[Segment]:
    """Where a range is stored that the layers above lack."""
    stored = 0 if node is None else max(0, min(length, node.size - offset))
    segments = [] if node is None or not stored else await node.plan_read(offset, stored)
    return segments if stored == length else [*segments, Segment(length - stored, None, 0)]


def labels_of_extents(extents: Sequence[Extent], unit: int, count_max: int) -> Labelled | None:
    """The labels of data and holes of a file; None: they are not in units."""
    offset, end = extents[0].offset, extents[-1].end
    if len(extents) == 1:
        return Labelled(b"D" if extents[0].kind is Kind.DATA else b"0", 0, offset, end, None)
    start = align_down(offset, unit)
    labels, position = bytearray(), start
    for extent in extents:
        if extent.end % unit and extent is not extents[-1]:
            return None
        count = (extent.end - 1 - position) // unit + 1
        if len(labels) + count > count_max:
            extent_end = min(extent.end, start + count_max * unit)
            count, end = (extent_end - 1 - position) // unit + 1, extent_end
        labels += (b"D" + b"d" * (count - 1)) if extent.kind is Kind.DATA else b"0" * count
        position += count * unit
        if len(labels) >= count_max:
            break
    return Labelled(bytes(labels), unit, start, end, None)
