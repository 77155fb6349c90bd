"""throttle: a disk whose guests are kept within the limits of a throttle group.

While there is room, requests pass without waiting, as if the filter were not there.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from blockd.block.chain import all_below
from blockd.block.node import BlockNode, Buffer, FilterNode, ProtocolNode, Segment
from blockd.extents import Kind
from blockd.filters.throttle_group import Direction, ThrottleGroup


@contextmanager
def unthrottled(*nodes: BlockNode) -> Iterator[None]:
    """Let everything pass for a while that is done to some nodes and to those below them."""
    with ExitStack() as releases:
        for node in dict.fromkeys(below for top in nodes for below in all_below(top)):
            if isinstance(node, Throttle):
                releases.enter_context(node.released())
        yield


def unthrottled_files(image: BlockNode) -> AbstractContextManager[None]:
    """Let an image bring what it has in memory to its file; what it reads from a backing file still waits."""
    return unthrottled(*(node for node in image.children().values() if isinstance(node, ProtocolNode)))


class Throttle(FilterNode):
    """A filter in front of any node, and a member of its group."""

    driver = "throttle"

    def __init__(self, child: BlockNode, group: ThrottleGroup, *, node_name: str) -> None:
        super().__init__(child, node_name=node_name)
        self._release_count = 0
        self.group = group
        group.members.append(self)

    def join(self, group: ThrottleGroup) -> None:
        """Leave the group for another one; what waits passes."""
        self.leave()
        self.group = group
        group.members.append(self)

    def leave(self) -> None:
        if self in self.group.members:
            self.group.members.remove(self)
            self.group.release(self)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let everything pass for a while, so that a drain need not wait for the limits."""
        self._release_count += 1
        self.group.release(self)
        try:
            yield
        finally:
            self._release_count -= 1

    @property
    def is_released(self) -> bool:
        return self._release_count > 0

    # -- reading ------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        group = self.group
        if not group.has_room(Direction.READ):
            return None
        data = self.child.read_nowait(offset, length)
        if data is not None:
            group.take(Direction.READ, length)
        return data

    async def read(self, offset: int, length: int) -> Buffer:
        await self.group.admit(self, Direction.READ, length)
        return await self.child.read(offset, length)

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        return [Segment(length, self, offset)]  # so that it comes through here

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        return None  # who knows the answer reads nothing, and that would not be counted

    # -- writing ------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        group = self.group
        if not group.has_room(Direction.WRITE) or not self.child.write_nowait(offset, data):
            return False
        group.take(Direction.WRITE, len(data))
        return True

    async def write(self, offset: int, data: Buffer) -> None:
        await self.group.admit(self, Direction.WRITE, len(data))
        await self.child.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        await self.group.admit(self, Direction.WRITE, length)
        await self.child.write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        await self.group.admit(self, Direction.WRITE, length)
        await self.child.discard(offset, length)

    async def close(self) -> None:
        self.leave()
