"""`blockctl image map`: which layer of a chain has a range of the disk, and where in which file.

The members mean what they mean in `qemu-img map`: `depth` counts the layers above, `present` is false
where no layer has anything, `zero` reads as zeroes, `data` is stored, at `offset` of a file unless it is
compressed.
"""

from collections.abc import AsyncIterator
from typing import NamedTuple

from blockd.block.node import BlockNode, ProtocolNode
from blockd.extents import Extent, Kind


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
            self[2:6] == last[2:6]
            and self.filename == last.filename
            and self.offset == (None if last.offset is None else last.offset + last.length)
        )


async def chain_entries(image: BlockNode, start: int, end: int) -> AsyncIterator[Entry]:
    """The entries of a range, in order, neighbours different."""
    last: Entry | None = None
    while start < end:
        for entry in await _next_entries(image, start, end):
            start = entry.end
            if last is not None and entry.continues(last):
                last = last._replace(length=last.length + entry.length)
                continue
            if last is not None:
                yield last
            last = entry
    if last is not None:
        yield last


async def _next_entries(image: BlockNode, start: int, end: int) -> list[Entry]:
    """What the first layer that has something at `start` says; entries may stop before `end`."""
    depth = 0
    while True:
        extent = (await image.map(start, end - start))[0]
        below = image.backing
        if extent.kind is not Kind.UNALLOCATED or below is None or start >= below.size:
            return await _entries(image, extent, depth)
        image, end, depth = below, min(extent.end, below.size), depth + 1


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


def entry_object(entry: Entry) -> dict[str, object]:
    """QEMU's MapEntry."""
    found = {name: value for name, value in entry._asdict().items() if name != "filename"}
    if entry.offset is None:
        del found["offset"]
    return found


HEADING = f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File"


def entry_line(entry: Entry) -> str:
    """A line of the table, which has only what is stored."""
    where = "(compressed)" if entry.offset is None else _hex(entry.offset)
    return f"{_hex(entry.start):<16}{_hex(entry.length):<16}{where:<16}{entry.filename}"


def _hex(number: int) -> str:
    """As printf's %#x, for which zero needs no prefix."""
    return f"{number:#x}" if number else "0"
