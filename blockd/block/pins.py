"""Plans name nodes, and nodes that are named stay open until the plan is done.

What a plan names (a node, a place in its file, its descriptor) is used after waiting, in a thread or by
another process. Meanwhile the graph may have no more use for the node: the end of one stream removes layers
that another one still reads. So who plans pins all nodes below, and closing a node waits for its pins.

The requests of guests are kept out of a root while the graph below it changes (root.py): they need no pins.
"""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockd.block.node import BlockNode


class Pins:
    """How many plans name a node."""

    __slots__ = ("count", "released")

    def __init__(self) -> None:
        self.count = 0
        # There once somebody waits for it.
        self.released: asyncio.Event | None = None


@contextmanager
def pinned(nodes: "Iterable[BlockNode]") -> Iterator[None]:
    """Inside, no node of these is closed."""
    held = [node.pins for node in nodes]
    for pins in held:
        pins.count += 1
    try:
        yield
    finally:
        for pins in held:
            pins.count -= 1
            if not pins.count and pins.released is not None:
                pins.released.set()


async def unpinned(node: "BlockNode") -> None:
    """Return when no plan names a node any more; of nodes above it that are gone already, new ones do not."""
    while node.pins.count:
        node.pins.released = node.pins.released or asyncio.Event()
        node.pins.released.clear()
        await node.pins.released.wait()
