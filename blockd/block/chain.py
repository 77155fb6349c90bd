"""Walking a backing chain: what the layers together hold, and where."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Final

from blockd.aio import Turns
from blockd.block.layers import look_through
from blockd.block.node import BlockNode, FilterNode, OverlayNode
from blockd.block.segments import SourcePlan, can_read_blocking
from blockd.extents import Extent, Kind, Range, merged, total_length

# How many extents one look through a chain tells about; some more, since all that was found out is told.
EXTENT_COUNT_MAX: Final = 512
EXTENT_COUNT_FEW: Final = 64
# A look below goes on behind clusters that hide what is there, if they are at most so many times as much as
# what follows: it is cheaper than another look, and all looks together stay in proportion to what they tell.
HIDDEN_FACTOR: Final = 16
# How many times as much as some ranges are may be around them for one plan of all.
SPREAD_FACTOR: Final = 4


def unfiltered(node: BlockNode) -> BlockNode:
    """The node below the filters that are put in front of it."""
    while isinstance(node, FilterNode):
        node = node.child
    return node


def all_below(node: BlockNode) -> Iterator[BlockNode]:
    """A node and all that its requests may come through."""
    pending = [node]
    while pending:
        yield (found := pending.pop())
        pending += found.children().values()


def chain(top: BlockNode) -> Iterator[BlockNode]:
    """The nodes from `top` down to the last backing, filters left out."""
    node: BlockNode | None = top
    while node is not None:
        node = unfiltered(node)
        yield node
        node = node.backing


def layers_above(base: BlockNode, top: BlockNode) -> Iterator[BlockNode]:
    """The nodes from `top` down to, not including, `base`; filters left out."""
    return takewhile(lambda node: node is not base, chain(top))


def chain_with_filters(top: BlockNode) -> Iterator[BlockNode]:
    """The nodes from `top` down to the last backing, with the filters in front of them."""
    node: BlockNode | None = top
    while node is not None:
        yield node
        node = node.child if isinstance(node, FilterNode) else node.backing


def format_of(node: BlockNode) -> str:
    """What is recorded as the format of a backing file; bytes that nothing interprets are raw."""
    image = unfiltered(node)
    return image.driver if image.children() else "raw"


def primary_child(node: BlockNode) -> BlockNode | None:
    """What a node has its bytes in: its file, or what it injects faults into."""
    children = node.children()
    return children.get("file", children.get("image"))


async def layer_map(node: BlockNode, base: BlockNode | None, offset: int, length: int) -> list[Extent]:
    """Tell what the layers from `node` down to, not including, `base` hold together.

    UNALLOCATED means: in none of them. Past the end of a shorter layer there are zeroes.

    Shape:    as `BlockNode.map`: may cover only a prefix of the range.
    """
    return list(merged(await _layer_extents(node, base, offset, length)))


async def _layer_extents(
    node: BlockNode | None, base: BlockNode | None, offset: int, length: int
) -> list[Extent]:
    if node is None or (node := unfiltered(node)) is base:
        return [Extent(offset, length, Kind.UNALLOCATED)]
    if offset >= node.size:
        return [Extent(offset, length, Kind.ZERO)]
    look = await look_through(node, base, offset, min(length, node.size - offset))
    if look is not None:
        return await with_layers_below(look.extents(), look.rest, base)
    backing = node.backing  # of before: what the map tells is true of that, also when there is another one
    own = await node.map(offset, min(length, node.size - offset))
    return await with_layers_below(own, backing, base)


async def with_layers_below(
    own: list[Extent], node: BlockNode | None, base: BlockNode | None, own_kind: Kind | None = None
) -> list[Extent]:
    """Tell what a layer holds, and for what is UNALLOCATED there, what the layers from `node` down do.

    `own_kind`: what to tell of what the layer itself holds, instead of its kind.

    Shape:    in order, without gaps; may cover only a prefix of `own`.
    """
    if own_kind is None and (node is None or unfiltered(node) is base):
        return own
    lacking = [(extent.offset, extent.end) for extent in own if extent.kind is Kind.UNALLOCATED]
    below = await extents_below(lacking, node, base) if lacking else []
    if len(below) > EXTENT_COUNT_FEW:
        await asyncio.sleep(0)  # in a deep chain all of it is handed up layer by layer
    found: list[Extent] = []
    number = 0
    for extent in own:
        if extent.kind is not Kind.UNALLOCATED:
            found.append(extent if own_kind is None else Extent(extent.offset, extent.length, own_kind))
            continue
        while number < len(below) and below[number].offset < extent.end:
            found.append(below[number])
            number += 1
        if not found or found[-1].end < extent.end:
            break
    return found


async def extents_below(
    ranges: Sequence[Range], node: BlockNode | None, base: BlockNode | None
) -> list[Extent]:
    """Tell what the layers from `node` down to, not including, `base` hold of some ranges.

    A look below is for as many neighbours as it tells about: where layers are in many pieces, all that each
    one tells is used.

    Shape:    in order, cut at the ends of the ranges; may stop early, but not before anything is told.
    """
    found: list[Extent] = []
    below: list[Extent] = []
    number = 0  # of the first one in `below` that may be needed still
    for (start, end), look_end in zip(ranges, _look_ends(ranges), strict=True):
        offset = start
        while offset < end:
            while number < len(below) and below[number].end <= offset:
                number += 1
            if number == len(below):
                if len(found) >= EXTENT_COUNT_MAX:
                    return found
                await asyncio.sleep(0)  # each layer's map takes its time; guests have their turn
                below, number = await _layer_extents(node, base, offset, look_end - offset), 0
            part_end = min(end, below[number].end)
            found.append(Extent(offset, part_end - offset, below[number].kind))
            offset = part_end
    return found


def _look_ends(ranges: Sequence[Range]) -> list[int]:
    """Up to where to look below from each range on: over what hides little of it."""
    ends: list[int] = []
    next_start = look_end = sys.maxsize
    next_length = 0
    for start, end in reversed(ranges):
        if next_start - end > HIDDEN_FACTOR * next_length:
            look_end = end
        next_start, next_length = start, end - start
        ends.append(look_end)
    return ends[::-1]


async def plan_below(image: OverlayNode, ranges: Sequence[Range]) -> SourcePlan:
    """Tell where some ranges are stored below an image that has nothing for them.

    Many that are near each other are looked for at once: that also tells what lies between them, which nobody
    reads, unless it is not in files: then it might be fetched.
    """
    first, last_end = ranges[0][0], ranges[-1][1]
    if len(ranges) > 1 and last_end - first <= SPREAD_FACTOR * total_length(ranges):
        segments = await image.plan_backing_read(first, last_end - first)
        await asyncio.sleep(0)  # a look takes as long as many requests; guests have their turn
        if can_read_blocking(segments):
            return SourcePlan(first, segments)
    source, turns = SourcePlan(), Turns()
    for start, end in ranges:
        source.add(start, await image.plan_backing_read(start, end - start))
        await turns.pass_on()
    return source


async def chain_map(node: BlockNode, offset: int, length: int) -> list[Extent]:
    """Tell what a whole chain holds; UNALLOCATED: no layer has anything, it reads as zeroes.

    Shape:    as `BlockNode.map`: may cover only a prefix of the range.
    """
    return await layer_map(node, None, offset, length)
