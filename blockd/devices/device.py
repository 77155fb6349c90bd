"""Devices: a disk with its users, whose graph is changed under it.

Two things of one disk are kept apart: the *node* it was put on, and the *root* that guests hold. A
job's filter stands between them while the job runs, so the root's top is the filter then.

Locks:    `Devices.changing` → the drain of a root. Whoever changes the graph, or a decision that
          depends on it, holds `changing`; guest requests never do.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

from blockd.block.chain import format_of, unfiltered
from blockd.block.node import BlockNode, FilterNode, OverlayNode
from blockd.block.root import Root
from blockd.drivers import NodeGraph
from blockd.errors import ErrorKind, RequestError, StorageError
from blockd.filters.blkstream import BlkStream
from blockd.filters.throttle import Throttle
from blockd.formats.add_cow.image import AddCowImage


class Device:
    """One disk; `name` is empty for a node that is used without anyone having named a device."""

    def __init__(self, name: str, node: BlockNode, root: Root) -> None:
        self.name = name
        self.node = node
        self.root = root
        # Exports of the device by id, and those of them whose clients may write.
        self.exports: set[str] = set()
        self.writable_exports: set[str] = set()

    @property
    def active(self) -> BlockNode:
        """The image the guest writes, below all filters."""
        return unfiltered(self.node)

    @property
    def user(self) -> str:
        """Who uses the node, in words for people."""
        return f"device '{self.name}'" if self.name else "exports"


class Devices:
    """All devices, and the job filters in front of images."""

    def __init__(self, graph: NodeGraph) -> None:
        self.graph = graph
        self.changing = asyncio.Lock()
        self._devices: list[Device] = []
        self._fronts: dict[BlockNode, _Front] = {}
        # Kept empty by whoever holds `changing`.
        self._drained: set[Root] = set()
        # Makes durable what the devices stand on; awaited before guests go on there. May raise StorageError.
        self.record: Callable[[], Awaitable[None]] = _keep_no_record

    def __iter__(self) -> Iterator[Device]:
        """The devices that have a name."""
        return iter([device for device in self._devices if device.name])

    @property
    def all(self) -> tuple[Device, ...]:
        """All devices, those without a name too."""
        return tuple(self._devices)

    # -- finding ------------------------------------------------------------------------------

    def get(self, name: str) -> Device:
        """Find a device by its name.

        Raises:   RequestError of kind DEVICE_NOT_FOUND.
        """
        for device in self:
            if device.name == name:
                return device
        raise RequestError(f"Device '{name}' not found", kind=ErrorKind.DEVICE_NOT_FOUND)

    def find_node(self, name: str) -> BlockNode:
        """Find the node of a device, or a node, by name.

        Raises:   RequestError: neither exists.
        """
        return self.find(device=name, node_name=name)

    def find(self, *, device: str | None = None, node_name: str | None = None) -> BlockNode:
        """Find the node of a device, or else a node; at least one of the names is given.

        Raises:   RequestError: neither exists.
        """
        for found in self:
            if found.name == device:
                return found.node
        if node_name is None or node_name not in self.graph.nodes:
            raise RequestError(f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'")
        return self.graph[node_name]

    def require_present(self, node: BlockNode) -> None:
        """Refuse a node that was removed while its user waited for `changing`."""
        if self.graph.nodes.get(node.node_name) is not node:
            raise RequestError(f"Cannot find device='' nor node-name='{node.node_name}'")

    def has_writers(self, image: BlockNode) -> bool:
        """Whether guests may write to an image."""
        return any(device.writable_exports for device in self._devices if device.active is unfiltered(image))

    def lose(self, image: BlockNode, reason: StorageError) -> None:
        """Let the guests of an image know, at their next flush, that something they wrote is lost."""
        for device in self._devices:
            if device.active is image:
                device.root.lose(reason)

    # -- coming and going (with `changing` held) ----------------------------------------------

    def add(self, name: str, node: BlockNode) -> Device:
        """Make a device of a node, or give a name to the one that is on it already.

        Raises:   RequestError: the name is taken.
        """
        if any(device.name == name for device in self):
            raise RequestError(f"Device '{name}' already exists")
        device = self._on(node)
        if device is None or device.name:
            return self._make(name, node)
        self.graph.remove_user(node, device.user)
        device.name = name
        self.graph.add_user(node, device.user)
        return device

    def on(self, node: BlockNode) -> Device:
        """The device on a node; one without a name is made if there is none."""
        return self._on(node) or self._make("", node)

    def _on(self, node: BlockNode) -> Device | None:
        return next((device for device in self._devices if device.node is node), None)

    def _make(self, name: str, node: BlockNode) -> Device:
        device = Device(name, node, Root(self._top_of(node)))
        self.graph.add_user(node, device.user)
        self._devices.append(device)
        return device

    async def forget_unused(self, device: Device) -> None:
        """Let a device go that has neither a name nor an export."""
        if not device.name and not device.exports:
            self._devices.remove(device)
            self.graph.remove_user(device.node, device.user)
            await self.graph.close_unused()

    # -- changing what stands under the guests (with `changing` held) --------------------------

    @asynccontextmanager
    async def drained(self, *nodes: BlockNode) -> AsyncIterator[None]:
        """Keep guest requests out of every device that has one of the nodes below it.

        May be entered again inside: what is drained already stays so until the outer one ends.
        """
        changed = {unfiltered(node) for node in nodes}
        roots = [device.root for device in self._devices if changed.intersection(all_below(device.node))]
        added = [root for root in roots if root not in self._drained]
        async with AsyncExitStack() as drains:
            for device in self._devices:
                for node in all_below(device.node) if device.root in added else ():
                    if isinstance(node, Throttle):
                        drains.enter_context(node.released())
            for root in added:
                await drains.enter_async_context(root.drained())
                self._drained.add(root)
                drains.callback(self._drained.discard, root)
            yield

    def put_in_front(self, active: BlockNode, front: FilterNode) -> None:
        """Put the filter of a job between an image and all who use it.

        A copy-on-read filter in front of the image stays out of the way meanwhile: two of them would not
        know of each other's copies.

        Needs:    `drained(active)`.
        """
        links = list(self._links_above(active))
        for link in links:
            self._connect(link.parent, link.role, front)
        self._fronts[active] = _Front(front, links)
        self._settle_roots(active)

    def take_from_front(self, active: BlockNode) -> None:
        """Take the filter away again.

        Needs:    `drained(active)`.
        """
        front, before = self._fronts.pop(active)
        below = {(link.parent, link.role): link.child for link in before}
        for parent, role in list(self.graph.parents(front)):
            self._connect(parent, role, below.get((parent, role), active))
        self._settle_roots(active)

    def put_overlay(self, old: BlockNode, overlay: OverlayNode) -> None:
        """Put an image that has `old` as its backing in the place of `old`, for all who use that.

        Needs:    `drained(old)`; no filter of a job in front of `old`.
        """
        for link in list(self._links_above(old)):
            if link.parent is not overlay:
                self._connect(link.parent, link.role, overlay)
        for device in self._devices:
            if device.node is old:
                self._put_on(device, overlay)

    def take_overlay(self, old: BlockNode, overlay: OverlayNode) -> None:
        """Undo `put_overlay`.

        Needs:    `drained(overlay)`.
        """
        for link in list(self._links_above(overlay)):
            self._connect(link.parent, link.role, old)
        for device in self._devices:
            if device.node is overlay:
                self._put_on(device, old)

    def leave_add_cow(self, overlay: AddCowImage) -> bool:
        """Put the image of an add-cow file in its place, for all who use it; its node may be closed then.

        A node that a client has added stays where it is, for that client speaks of it, and so does one that
        has copy-on-read in front.

        Needs:    `drained(overlay)`; everything is in the image; no filter of a job in front of `overlay`.
        """
        above = [parent for parent, _ in self.graph.parents(overlay)]
        if self.graph.is_added(overlay) or any(isinstance(parent, BlkStream) for parent in above):
            return False
        self.take_overlay(overlay.image, overlay)
        return True

    async def change_backing(self, image: OverlayNode, filename: str | None) -> None:
        """Record another name for the backing of an image, which may be read-only but for that.

        Raises:   RequestError, ImageError, StorageError: it cannot be; the old name is still recorded.
        """
        assert image.backing is not None, "without a backing there is nothing to name"
        async with self.drained(image):
            was_read_only = image.read_only
            await self.graph.set_read_only(image, False)
            try:
                await image.change_backing(filename, format_of(image.backing))
            finally:
                await self.graph.set_read_only(image, was_read_only)

    def _put_on(self, device: Device, node: BlockNode) -> None:
        self.graph.add_user(node, device.user)
        self.graph.remove_user(device.node, device.user)
        device.node = node
        device.root.replace(node)

    def _connect(self, parent: BlockNode, role: str, child: BlockNode) -> None:
        if isinstance(parent, FilterNode):
            parent.stand_before(child)
            self.graph.refresh_filters(parent)
        else:
            assert role == "backing", "only filters and overlays stand above images"
            parent.backing = child

    def _links_above(self, node: BlockNode) -> Iterator["_Link"]:
        for parent, role in self.graph.parents(node):
            if isinstance(parent, BlkStream):
                yield from self._links_above(parent)
            else:
                yield _Link(parent, role, node)

    def _settle_roots(self, active: BlockNode) -> None:
        for device in self._devices:
            if device.active is active:
                device.root.replace(self._top_of(device.node))

    def _top_of(self, node: BlockNode) -> BlockNode:
        """What guests of a node use: the filter of a job, if nothing but copy-on-read is above that."""
        below = node
        while isinstance(below, BlkStream):
            below = below.child
        front = self._fronts.get(below)
        return node if front is None else front.filter


def all_below(node: BlockNode) -> Iterator[BlockNode]:
    """A node and all that its requests may come through."""
    yield node
    for child in node.children().values():
        yield from all_below(child)


async def _keep_no_record() -> None:
    """Nobody asked for one."""


class _Link(NamedTuple):
    """A node that has another one below it."""

    parent: BlockNode
    role: str
    child: BlockNode


class _Front(NamedTuple):
    """The filter of a job, and how it was before."""

    filter: FilterNode
    links: list[_Link]
