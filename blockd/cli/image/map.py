"""`blockctl image map`: which layer of a chain has a range of the disk, and where in which file.

The members mean what they mean in `qemu-img map`: `depth` counts the layers above, `present` is false
where no layer has anything, `zero` reads as zeroes, `data` is stored, at `offset` of a file unless it is
compressed.
"""

from collections.abc import AsyncIterator
from functools import cache
from operator import itemgetter
from typing import Final, NamedTuple

from blockd.block.layers import Look, Run, look_through
from blockd.block.node import BlockNode, ProtocolNode, Segment
from blockd.extents import Extent, Kind

# There are very many entries: a named tuple's own constructor takes three times as long.
_new: Final = tuple.__new__


class Entry(NamedTuple):
    """A range of the disk that is stored in one place, or nowhere."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    filename: str | None

    @property
    def end(self) -> int:
        return self.start + self.length

    def continues(self, last: "Entry") -> bool:
        """Whether this one and the one before can be told as one."""
        return (
            self.depth == last.depth
            and self.offset == (None if last.offset is None else last.offset + last.length)
            and self[3:6] == last[3:6]
            and self.filename == last.filename
        )


async def chain_entries(image: BlockNode, start: int, end: int) -> AsyncIterator[list[Entry]]:
    """The entries of a range, in order, neighbours different; many at a time."""
    last: Entry | None = None
    while start < end:
        found: list[Entry] = []
        entries = await _next_entries(image, start, end)
        start = entries[-1].end
        for entry in entries:
            if last is None:
                last = entry
            elif entry.depth == last.depth and entry.continues(last):
                last = _new(Entry, (last.start, last.length + entry.length, *last[2:]))
            else:
                found.append(last)
                last = entry
        if found:
            yield found
    if last is not None:
        yield [last]


async def _next_entries(image: BlockNode, start: int, end: int, depth: int = 0) -> list[Entry]:
    """What the layers from `image` down say from `start` on; entries may stop before `end`."""
    look = await look_through(image, None, start, end - start, with_places=True)
    if look is not None:
        return await _look_entries(look, depth)
    found: list[Entry] = []
    below = image.backing
    for extent in await image.map(start, end - start):
        below_end = 0 if below is None or extent.kind is not Kind.UNALLOCATED else below.size
        offset = extent.offset
        while below is not None and offset < min(extent.end, below_end):
            found += await _next_entries(below, offset, min(extent.end, below_end), depth + 1)
            offset = found[-1].end
        if offset < extent.end:
            found += await _entries(image, Extent(offset, extent.end - offset, extent.kind), depth)
    return found


async def _look_entries(look: Look, depth: int) -> list[Entry]:
    """What some layers say together, from layer `depth` of the chain down."""
    runs = look.runs()
    segments = await look.segments(runs)
    placed = list(filter(None, segments))
    if len(placed) == len(runs):
        return _placed_entries(look, runs, placed, depth)
    found: list[Entry] = []
    for run, segment in zip(runs, segments, strict=True):
        if segment is None:
            found += await _rest_entries(look, run, depth)
        else:
            found += _placed_entries(look, [run], [segment], depth)
    return found


def _placed_entries(look: Look, runs: list[Run], segments: list[Segment], depth: int) -> list[Entry]:
    """The entries of runs that the layers have themselves, stored in these segments."""
    # Asking each time what a source is takes long.
    sources = set(map(itemgetter(1), segments))
    filenames = {source: source.filename for source in sources if isinstance(source, ProtocolNode)}
    places = [(offset, filenames[source]) if source in filenames else None for _, source, offset in segments]
    nowhere = [(None, node.filename) for node, _ in look.layers]
    return [
        _new(Entry, (start, length, depth + layer, True, zero, not zero, *(place or nowhere[layer])))
        for (start, length, layer, zero), place in zip(runs, places, strict=True)
        if layer is not None
    ]


async def _rest_entries(look: Look, run: Run, depth: int) -> list[Entry]:
    """What the layers below those that were looked at say of a part of the disk."""
    found: list[Entry] = []
    below, offset, end = look.rest, run.offset, run.offset + run.length
    while below is not None and offset < min(end, below.size):
        found += await _next_entries(below, offset, min(end, below.size), depth + len(look.layers))
        offset = found[-1].end
    if offset < end:
        last_depth = depth + len(look.layers) - 1
        found.append(Entry(offset, end - offset, last_depth, False, True, False, None, None))
    return found


async def _entries(image: BlockNode, extent: Extent, depth: int) -> list[Entry]:
    """Where one extent of one layer is stored."""
    if extent.kind is Kind.UNALLOCATED:
        return [Entry(extent.offset, extent.length, depth, False, True, False, None, None)]
    found, start = [], extent.offset
    is_data = extent.kind is Kind.DATA
    for segment in await image.plan_read(extent.offset, extent.length):
        is_placed = isinstance(segment.source, ProtocolNode)
        offset = segment.offset if is_placed else None
        filename = segment.source.filename if isinstance(segment.source, ProtocolNode) else image.filename
        found.append(Entry(start, segment.length, depth, True, not is_data, is_data, offset, filename))
        start += segment.length
    return found


_BOOLEANS = ("false", "true")


@cache
def _kind_json(depth: int, present: bool, zero: bool, data: bool) -> str:
    """The members of which there are few combinations."""
    return (
        f'"depth": {depth}, "present": {_BOOLEANS[present]}, "zero": {_BOOLEANS[zero]}, '
        f'"data": {_BOOLEANS[data]}'
    )


def entry_json(entry: Entry) -> str:
    """QEMU's MapEntry; there are many, so it is written out."""
    start, length, depth, present, zero, data, offset, _ = entry
    where = "" if offset is None else f', "offset": {offset}'
    return f'{{"start": {start}, "length": {length}, {_kind_json(depth, present, zero, data)}{where}}}'


HEADING = f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File"


def entry_line(entry: Entry) -> str:
    """A line of the table, which has only what is stored."""
    where = "(compressed)" if entry.offset is None else _hex(entry.offset)
    return f"{_hex(entry.start):<16}{_hex(entry.length):<16}{where:<16}{entry.filename}"


def _hex(number: int) -> str:
    """As printf's %#x, for which zero needs no prefix."""
    return f"{number:#x}" if number else "0"
