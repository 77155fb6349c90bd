"""In which layer of a chain each part of a disk is, counted from the top, as QEMU counts.

The node itself is number 1. A filter is a layer, too, and has what the one below it has; so in front of an
image with a backing file, data of the image is in layer 1, and data of the backing file in layer 3.
"""

from blockd.aio import Turns
from blockd.block.node import BlockNode, FilterNode
from blockd.extents import Extent, Kind

# How many extents of all layers are looked at for one answer.
PART_COUNT_MAX = 1024

# So many bytes, and the layer that they are in; 0: in none.
Part = tuple[int, int]


async def depths(node: BlockNode, offset: int, length: int) -> list[Part]:
    """Tell the layers of a range.

    Shape:    parts from `offset` on, none empty; they may cover only a prefix of the range.
    """
    return await _Depths().look(node, offset, offset + length, 1)


class _Depths:
    """One look at a range."""

    def __init__(self) -> None:
        self._count = 0
        self._turns = Turns()

    async def look(self, node: BlockNode, offset: int, end: int, depth: int) -> list[Part]:
        """What `node`, which is number `depth`, and those below it say of a range, or of the start of it."""
        found: list[Part] = []
        below = node.child if isinstance(node, FilterNode) else node.backing
        for extent in await node.map(offset, end - offset):
            await self._turns.pass_on()
            if extent.kind is not Kind.UNALLOCATED:
                found.append((extent.length, depth))
            elif below is None:
                found.append((extent.length, 0))
            else:
                found += await self._look_below(below, extent, depth + 1)
            self._count += 1
            if self._count >= PART_COUNT_MAX:
                break
        return found

    async def _look_below(self, below: BlockNode, extent: Extent, depth: int) -> list[Part]:
        found: list[Part] = []
        offset = extent.offset
        while offset < extent.end:
            if offset >= below.size:  # zeroes, which count as those of the layer that is too short
                found.append((extent.end - offset, depth))
                break
            some = await self.look(below, offset, min(extent.end, below.size), depth)
            found += some
            offset += sum(length for length, _ in some)
            if self._count >= PART_COUNT_MAX:
                break
        return found
