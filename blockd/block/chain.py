"""Walking a backing chain: what the layers together hold, and where."""

from collections.abc import Iterator

from blockd.block.node import BlockNode, FilterNode
from blockd.extents import Extent, Kind, merged


def unfiltered(node: BlockNode) -> BlockNode:
    """The node below the filters that are put in front of it."""
    while isinstance(node, FilterNode):
        node = node.child
    return node


def chain(top: BlockNode) -> Iterator[BlockNode]:
    """The nodes from `top` down to the last backing, filters left out."""
    node: BlockNode | None = top
    while node is not None:
        node = unfiltered(node)
        yield node
        node = node.backing


def format_of(node: BlockNode) -> str:
    """What is recorded as the format of a backing file; bytes that nothing interprets are raw."""
    image = unfiltered(node)
    return image.driver if image.children() else "raw"


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
    own = await node.map(offset, min(length, node.size - offset))
    found: list[Extent] = []
    for extent in own:
        if extent.kind is not Kind.UNALLOCATED:
            found.append(extent)
            continue
        below = await _layer_extents(node.backing, base, extent.offset, extent.length)
        found += below
        if below[-1].end < extent.end:
            break
    return found


async def chain_map(node: BlockNode, offset: int, length: int) -> list[Extent]:
    """Tell what a whole chain holds; UNALLOCATED: no layer has anything, it reads as zeroes.

    Shape:    as `BlockNode.map`: may cover only a prefix of the range.
    """
    return await layer_map(node, None, offset, length)
