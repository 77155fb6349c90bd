"""What guests' requests become by options of the image: writes of zeroes, and discards that are ignored.

It stands between a disk and its guests, and only where an option asks for it; the graph does not know of it.
"""

from collections.abc import Iterator

from blockd.block.node import BlockNode, Buffer, FilterNode
from blockd.block.settings import DetectZeroes
from blockd.units import KIB

_ZEROES = bytes(64 * KIB)


def for_guests(node: BlockNode) -> BlockNode:
    """What guests of `node` use: the node itself unless it, or the image below filters, is told otherwise."""
    settings = [layer.settings for layer in _down_to_image(node)]
    told = [layer.detect_zeroes for layer in settings if layer.detect_zeroes is not DetectZeroes.OFF]
    detect = told[0] if told else DetectZeroes.OFF
    discards = all(layer.discards for layer in settings)
    if discards and detect is DetectZeroes.OFF:
        return node
    return GuestRequests(node, detect, discards=discards)


def _down_to_image(node: BlockNode) -> Iterator[BlockNode]:
    yield node
    while isinstance(node, FilterNode):
        node = node.child
        yield node


def is_zero(data: Buffer) -> bool:
    """Whether there is nothing but zeroes; data that is not has cost a look at its first bytes, mostly."""
    view = memoryview(data)
    if view[0] or view[-1]:
        return False
    step = len(_ZEROES)
    return all(_ZEROES.startswith(view[start : start + step]) for start in range(0, len(view), step))


class GuestRequests(FilterNode):
    """A disk whose guests' zeroes are detected, or whose guests' discards are ignored."""

    driver = "guest-requests"

    def __init__(self, child: BlockNode, detect: DetectZeroes, *, discards: bool) -> None:
        super().__init__(child, node_name=child.node_name)
        self._detect = detect
        self._discards = discards
        self._unmaps = discards and detect is DetectZeroes.UNMAP

    @property
    def size(self) -> int:
        return self.child.size

    @size.setter
    def size(self, size: int) -> None:
        """The size is that of the node below."""

    @property
    def copies_apart(self) -> bool:
        return self.child.copies_apart

    # -- reading ------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return self.child.read_nowait(offset, length)

    async def read(self, offset: int, length: int) -> Buffer:
        return await self.child.read(offset, length)

    # -- writing ------------------------------------------------------------------------------

    def _is_detected(self, data: Buffer) -> bool:
        return self._detect is not DetectZeroes.OFF and is_zero(data)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if self._is_detected(data):
            return self._unmaps and self.child.write_zeroes_nowait(offset, len(data))
        return self.child.write_nowait(offset, data)

    async def write(self, offset: int, data: Buffer) -> None:
        if self._is_detected(data):
            await self.child.write_zeroes(offset, len(data), unmap=self._unmaps)
        else:
            await self.child.write(offset, data)

    def write_zeroes_nowait(self, offset: int, length: int) -> bool:
        return self._discards and self.child.write_zeroes_nowait(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        await self.child.write_zeroes(offset, length, unmap=unmap and self._discards)

    def discard_nowait(self, offset: int, length: int) -> bool:
        return not self._discards or self.child.discard_nowait(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        if self._discards:
            await self.child.discard(offset, length)
