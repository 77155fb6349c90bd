"""Devices: a disk with its users, whose graph is changed under it.

Two things of one disk are kept apart: the *node* it was put on, and the *root* that guests hold. A
job's filter stands between them while the job runs, so the root's top is the filter then.

Locks:    `Devices.changing` → the drain of a root. Whoever changes the graph, or a decision that
          depends on it, holds `changing`; guest requests never do.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

from blockd.block.chain import format_of, unfiltered
from blockd.block.node import BlockNode, FilterNode, OverlayNode
from blockd.block.root import Root
from blockd.devices.turns import ChangeLock
from blockd.drivers import NodeGraph
from blockd.drivers.permissions import Claim
from blockd.errors import ErrorKind, RequestError
from blockd.filters.blkstream import BlkStream
from blockd.filters.guest_requests import for_guests
from blockd.filters.throttle import unthrottled
from blockd.formats.add_cow.image import AddCowImage

log = logging.getLogger(__name__)

# How long a command waits for requests of guests that are under way: it keeps all others from changing any
# disk meanwhile.
DRAIN_MAX_S = 30.0


class Undrained(RequestError):
    """Requests of guests that are under way do not end, so that nothing under them can be changed."""


class Device:
    """One disk; `name` is empty for a node that is used without anyone having named a device."""

    def __init__(self, name: str, node: BlockNode, root: Root) -> None:
        self.name = name
        self.node = node
        self.root = root
        # Exports of the device by id, and what they may do to its node.
        self.exports: dict[str, Claim] = {}

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
        self.changing = ChangeLock()
        self.drain_max_s = DRAIN_MAX_S
        self._devices: dict[Device, None] = {}
        self._named: dict[str, Device] = {}
        self._by_node: defaultdict[BlockNode, dict[Device, None]] = defaultdict(dict)
        # Those that have ever lost something.
        self._losing: dict[Device, None] = {}
        self._fronts: dict[BlockNode, _Front] = {}
        # Kept empty by whoever holds `changing`.
        self._drained: set[Root] = set()
        # What images are about to record as their backing files: until that is done they may record either.
        self.changing_names: dict[OverlayNode, str | None] = {}
        # Makes durable what the devices stand on; awaited before guests go on there. May raise StorageError.
        self.record: Callable[[], Awaitable[None]] = _keep_no_record
        # What images have lost that are nobody's disk just now, and why: the next guests are told.
        self._losses: WeakKeyDictionary[BlockNode, str] = WeakKeyDictionary()
        # Told of lost writes: the names of the device and of its image's node, how many bytes if
        # that is known, and why.
        self.on_lost: Callable[[str, str, int | None, str], None] = _tell_nobody

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
        if name not in self._named:
            raise RequestError(f"Device '{name}' not found", kind=ErrorKind.DEVICE_NOT_FOUND)
        return self._named[name]

    def find_node(self, name: str) -> BlockNode:
        """Find the node of a device, or a node, by name.

        Raises:   RequestError: neither exists.
        """
        return self.find(device=name, node_name=name)

    def find(self, *, device: str | None = None, node_name: str | None = None) -> BlockNode:
        """Find the node of a device, or else a node; at least one of the names is given.

        Raises:   RequestError: neither exists.
        """
        if device in self._named:
            return self._named[device].node
        if node_name is None or node_name not in self.graph.nodes:
            raise RequestError(f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'")
        return self.graph[node_name]

    def require_present(self, node: BlockNode) -> None:
        """Refuse a node that was removed while its user waited for `changing`."""
        if self.graph.nodes.get(node.node_name) is not node:
            raise RequestError(f"Cannot find device='' nor node-name='{node.node_name}'")

    def lose(self, image: BlockNode, length: int | None, why: str) -> None:
        """Let the guests of an image know, at their next flush, that something they wrote is lost.

        `length`: how many bytes, if that is known.
        """
        lost = "may be lost" if length is None else f"are lost, {length} bytes"
        log.error("%s: acknowledged writes %s: %s", image.filename, lost, why)
        devices = self.note_loss(image, why)
        for name in [device.name for device in devices] or [""]:
            self.on_lost(name, image.node_name, length, why)

    def note_loss(self, image: BlockNode, why: str) -> list[Device]:
        """Let the guests of an image know of a loss that was logged already; returns its devices."""
        devices = self._with_active(image)
        for device in devices:
            self._lose(device, why)
        if not devices:
            self._losses[image] = why
        return devices

    def _lose(self, device: Device, why: str) -> None:
        device.root.lost_writes.add(why)
        self._losing[device] = None

    @property
    def losses(self) -> list[tuple[BlockNode, str]]:
        """The nodes of disks that have lost something which nobody has acknowledged, and why."""
        found = [(device.node, why) for device in self._losing if (why := device.root.lost_writes.why)]
        nodes = self.graph.nodes
        return found + [item for item in self._losses.items() if nodes.get(item[0].node_name) is item[0]]

    def acknowledge_loss(self, node: BlockNode) -> None:
        """Tell no guest any more of what a disk has lost.

        Raises:   RequestError: it has lost nothing.
        """
        image = unfiltered(node)
        if all(unfiltered(lossy) is not image for lossy, _ in self.losses):
            raise RequestError(f"Node '{node.node_name}' has lost no acknowledged writes")
        self._losses.pop(image, None)
        for device in self._with_active(image):
            device.root.lost_writes.acknowledge()

    def name_of(self, node: BlockNode) -> str:
        """The name of the device on a node; empty if there is none."""
        return next((device.name for device in self.at(node) if device.name), "")

    # -- coming and going (with `changing` held) ----------------------------------------------

    def add(self, name: str, node: BlockNode) -> Device:
        """Make a device of a node, or give a name to the one that is on it already.

        Raises:   RequestError: the name is taken.
        """
        if name in self._named:
            raise RequestError(f"Device '{name}' already exists")
        device = self._on(node)
        if device is None or device.name:
            return self._make(name, node)
        self.graph.remove_user(node, device.user)
        device.name = name
        self._named[name] = device
        self.graph.add_user(node, device.user)
        return device

    def on(self, node: BlockNode) -> Device:
        """The device on a node; one without a name is made if there is none."""
        return self._on(node) or self._make("", node)

    def at(self, node: BlockNode) -> list[Device]:
        """The devices on a node."""
        return [*self._by_node.get(node, ())]

    def _on(self, node: BlockNode) -> Device | None:
        return next(iter(self._by_node.get(node, ())), None)

    def _make(self, name: str, node: BlockNode) -> Device:
        device = Device(name, node, Root(self._top_of(node)))
        if (why := self._losses.pop(device.active, None)) is not None:
            self._lose(device, why)
        self.graph.add_user(node, device.user)
        self._devices[device] = None
        self._by_node[node][device] = None
        if name:
            self._named[name] = device
        return device

    async def forget_unused(self, device: Device) -> None:
        """Let a device go that has neither a name nor an export."""
        if not device.name and not device.exports:
            await self.remove(device)

    async def remove(self, device: Device) -> None:
        """Let a device go, and what only it needed.

        Needs:    it has no export and no job.
        """
        del self._devices[device]
        self._losing.pop(device, None)
        self._named.pop(device.name, None)
        self._by_node[device.node].pop(device)
        if not self._by_node[device.node]:
            del self._by_node[device.node]
        if (why := device.root.lost_writes.why) is not None:
            self._losses[device.active] = why
        self.graph.remove_user(device.node, device.user)
        await self.graph.close_unused()

    @asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """Hold `changing` for what a client has asked for.

        Raises:   NoTurn: the change before it waits for a file that does not answer; nothing happened.
        """
        await self.changing.unless_hanging(self.changing.acquire)
        try:
            yield
        finally:
            try:
                await self.adjust_locks()
            finally:
                self.changing.release()

    @asynccontextmanager
    async def change_unasked(self) -> AsyncIterator[None]:
        """Hold `changing` for what follows from what a client has asked for, however long the wait is."""
        async with self.changing:
            try:
                yield
            finally:
                await self.adjust_locks()

    async def adjust_locks(self) -> None:
        """Let go of files that nobody uses any more as far as they are locked."""
        try:
            await self.graph.nodes.locks.adjust()
        except RequestError as error:
            log.error("a file is not locked as it is used: %s", error.message)

    async def change_once_drained(self, change: Callable[[], Awaitable[None]]) -> None:
        """Make a change that nobody can refuse, as soon as the requests of guests let it.

        Meanwhile other changes have their turn. What `change` does first is a bounded drain.
        """
        is_told = False
        while True:
            try:
                async with self.change_unasked():
                    return await change()
            except Undrained as error:
                if not is_told:
                    log.warning("a filter cannot be taken away yet: %s", error.message)
                is_told = True

    # -- changing what stands under the guests (with `changing` held) --------------------------

    @asynccontextmanager
    async def drained(self, *nodes: BlockNode, is_bounded: bool = False) -> AsyncIterator[None]:
        """Keep guest requests out of every device that has one of the nodes below it.

        May be entered again inside: what is drained already stays so until the outer one ends.

        Raises:   Undrained: that is bounded, and those under way have not ended in time; guests go on.
        """
        above = self.graph.nodes.above(*map(unfiltered, nodes))
        devices = [device for node in above for device in self._by_node.get(node, ())]
        added = [device for device in devices if device.root not in self._drained]
        async with AsyncExitStack() as drains:
            drains.enter_context(unthrottled(*(device.node for device in added)))
            for device in added:
                try:
                    async with asyncio.timeout(self.drain_max_s if is_bounded else None):
                        await drains.enter_async_context(device.root.drained())
                except TimeoutError as error:
                    name = device.name or device.node.node_name
                    raise Undrained(
                        f"Requests of guests to '{name}' have not ended after {self.drain_max_s:g} s, "
                        "so nothing was changed; does a file hang?"
                    ) from error
                self._drained.add(device.root)
                drains.callback(self._drained.discard, device.root)
            yield

    def put_in_front(self, active: BlockNode, front: FilterNode) -> None:
        """Put the filter of a job between an image and all who use it.

        A copy-on-read filter in front of the image stays out of the way meanwhile: two of them would not
        know of each other's copies.

        Needs:    `drained(active)`; the filter is in the graph.
        """
        links = list(self._links_above(active))
        for link in links:
            self.graph.connect(link.parent, link.role, front)
        self._fronts[active] = _Front(front, links)
        self._settle_roots(active)

    def take_from_front(self, active: BlockNode) -> None:
        """Take the filter away again; who used the filter itself goes on with the image.

        Needs:    `drained(active)`.
        """
        front, before = self._fronts.pop(active)
        below = {(link.parent, link.role): link.child for link in before}
        for parent, role in list(self.graph.parents(front)):
            self.graph.connect(parent, role, below.get((parent, role), active))
        self._move(front, active)
        self._settle_roots(active)

    def put_overlay(self, old: BlockNode, overlay: OverlayNode) -> None:
        """Put an image on `old`, and in its place for all who use that.

        Needs:    `drained(old)`; no filter of a job in front of `old`.
        Raises:   RequestError: the overlay cannot stand there, or not be used as `old` is.
        Fails to: all is as before.
        """
        links = list(self._links_above(old))
        self.graph.connect(overlay, "backing", old)
        try:
            for link in links:
                self.graph.connect(link.parent, link.role, overlay)
            self._move(old, overlay)
            self.graph.permissions.require_below(overlay)
        except RequestError:
            self.take_overlay(old, overlay)
            self.graph.connect(overlay, "backing", None)
            raise

    def take_overlay(self, old: BlockNode, overlay: OverlayNode) -> None:
        """Put `old` in the place of an overlay, for all who use that.

        Needs:    `drained(overlay)`.
        """
        for link in list(self._links_above(overlay)):
            self.graph.connect(link.parent, link.role, old)
        self._move(overlay, old)

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
        self.graph.require_liftable(image)
        await image.require_recordable(filename, format_of(image.backing))
        async with self.drained(image, is_bounded=True):
            was_read_only = image.read_only
            self.changing_names[image] = filename
            try:
                await self.graph.set_read_only(image, False)
                await self.record()
                await image.change_backing(filename, format_of(image.backing))
            finally:
                del self.changing_names[image]
                await self.graph.set_read_only(image, was_read_only)

    def _move(self, old: BlockNode, new: BlockNode) -> None:
        """Put the devices of a node on another one."""
        for device in self._by_node.pop(old, {}):
            self._by_node[new][device] = None
            self.graph.add_user(new, device.user)
            self.graph.remove_user(old, device.user)
            for claim in device.exports.values():
                self.graph.permissions.move(claim, new)
            device.node = new
            device.root.replace(for_guests(new))

    def _with_active(self, image: BlockNode) -> list[Device]:
        """The devices whose guests write to an image, through filters at most."""
        found = [*self._by_node.get(image, ())]
        for parent, _ in self.graph.parents(image):
            if isinstance(parent, FilterNode):
                found += self._with_active(parent)
        return found

    def _links_above(self, node: BlockNode) -> Iterator["_Link"]:
        for parent, role in self.graph.parents(node):
            if isinstance(parent, BlkStream):
                yield from self._links_above(parent)
            else:
                yield _Link(parent, role, node)

    def settle_roots(self, node: BlockNode) -> None:
        """Let guests whose image a node is, or is in front of, have what its options say of their requests.

        Needs:    `drained(node)`.
        """
        self._settle_roots(unfiltered(node))

    def _settle_roots(self, active: BlockNode) -> None:
        for device in self._with_active(active):
            device.root.replace(self._top_of(device.node))

    def _top_of(self, node: BlockNode) -> BlockNode:
        """What guests of a node use: the filter of a job, if nothing but copy-on-read is above that.

        What options say of guests' requests comes first.
        """
        below = node
        while isinstance(below, BlkStream):
            below = below.child
        front = self._fronts.get(below)
        return for_guests(node if front is None else front.filter)


async def _keep_no_record() -> None:
    """Nobody asked for one."""


def _tell_nobody(device: str, node_name: str, length: int | None, why: str) -> None:
    """Nobody wants to know."""


class _Link(NamedTuple):
    """A node that has another one below it."""

    parent: BlockNode
    role: str
    child: BlockNode


class _Front(NamedTuple):
    """The filter of a job, and how it was before."""

    filter: FilterNode
    links: list[_Link]
