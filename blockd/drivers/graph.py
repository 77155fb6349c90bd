"""The node graph: every node by its name, who uses it and may do what to it, and when it goes.

A node stays while anyone needs it: a node above it, a user (a device, an export, a job), or the
client who added it by options and has not removed it. What nobody needs any more is closed, the
upper nodes before the lower ones.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import TypeVar

from blockd.aio import Turns, uninterrupted
from blockd.block.chain import unfiltered
from blockd.block.image_paths import ImagePaths
from blockd.block.moving import Move
from blockd.block.node import BlockNode, FilterNode, OverlayNode
from blockd.block.options import Options
from blockd.block.pins import unpinned
from blockd.drivers.nodes import Nodes
from blockd.drivers.opening import Opening, Restored, Unrecorded
from blockd.drivers.overlays import checked_overlay
from blockd.drivers.permissions import check_acyclic
from blockd.drivers.sharing import check_chain, check_unshared, files_of, use_if_writable
from blockd.drivers.table import DRIVERS, FORMATS, check_blockdev, copy_on_read
from blockd.drivers.uses import Plan
from blockd.errors import BlockdError, ErrorKind, RequestError
from blockd.filenames import given_path
from blockd.filters.throttle import unthrottled_files
from blockd.filters.throttle_group import ThrottleGroup
from blockd.formats.raw.image import RawImage
from blockd.formats.raw.part import RawPart
from blockd.protocols.image_lock import LockMode
from blockd.protocols.opening import Find

log = logging.getLogger(__name__)

COPY_ON_READ_PREFIX = "blkstream:"
Result = TypeVar("Result")
# Opens a node of an earlier run; see `NodeGraph.restore`.
Attempt = Callable[[Restored, Callable[[], Awaitable[None]]], Awaitable[bool]]


class NodeGraph:
    """All nodes of the daemon."""

    def __init__(
        self,
        paths: ImagePaths | None = None,
        find_throttle_group: Callable[[str], ThrottleGroup] | None = None,
        on_opened: Callable[[BlockNode], None] = lambda _: None,
    ) -> None:
        """`on_opened` is told of each node that was opened, or reopened, before anybody uses it."""
        self.image_paths = paths or ImagePaths()
        self.find_throttle_group = find_throttle_group or _no_throttle_group
        self._nodes = Nodes()
        self._users: dict[str, list[str]] = {}
        self.permissions = self._nodes.permissions
        # Nodes that stay without being used: those added by options, and new ones until their first user.
        self._added: set[str] = set()
        self._awaiting_user: set[str] = set()
        # What lost a user, or never had one: all that may be unused.
        self._suspects: dict[BlockNode, None] = {}
        # Only one change at a time: what an opening has checked still holds when it is done.
        self._lock = asyncio.Lock()
        self._on_opened = on_opened
        self._generated_names = self._generate_names()
        # What each node was told that was opened by options, and which were told to be read-only.
        self._options: dict[str, Options] = {}
        self._unclosed: dict[str, BlockNode] = {}
        self._told_read_only: set[str] = set()

    # -- looking ------------------------------------------------------------------------------

    @property
    def nodes(self) -> Nodes:
        """All nodes by name, in the order they were opened; they come and go here only."""
        return self._nodes

    def __getitem__(self, node_name: str) -> BlockNode:
        """Find a node.

        Raises:   RequestError: there is none of this name.
        """
        if node_name not in self._nodes:
            raise RequestError(f"Failed to find node with node-name='{node_name}'")
        return self._nodes[node_name]

    def parents(self, node: BlockNode) -> list[tuple[BlockNode, str]]:
        """The nodes right above, each with the role in which it uses `node`: ``file``, ``backing``."""
        return self._nodes.parents(node)

    def users(self, node: BlockNode) -> list[str]:
        """Who uses a node, other nodes left out."""
        return list(self._users.get(node.node_name, ()))

    def require_no_overlay(self, node: BlockNode) -> None:
        """Refuse a node that is the backing of another one."""
        for parent, role in self.parents(node):
            if role == "backing":
                raise RequestError(
                    f"Node '{node.node_name}' is busy: node is used as backing hd of '{parent.node_name}'"
                )

    def options(self, node: BlockNode) -> Mapping[str, object]:
        """What a node was told when it was opened by options; nothing for other nodes."""
        return MappingProxyType(self._options.get(node.node_name, {}))

    def set_options(self, node: BlockNode, options: Mapping[str, object]) -> None:
        """Keep what a node was told since."""
        self._options[node.node_name] = dict(options)
        self._nodes.touch(node)

    def is_told_read_only(self, node: BlockNode) -> bool:
        """Whether somebody has said that a node is read-only; others are so for being backing files."""
        return node.node_name in self._told_read_only

    def tell_read_only(self, node: BlockNode, is_told: bool) -> None:
        """Keep what was said of a node since."""
        (self._told_read_only.add if is_told else self._told_read_only.discard)(node.node_name)
        self._nodes.touch(node)

    def require_liftable(self, node: BlockNode) -> None:
        """Refuse to write, for a while, to an image that somebody has made read-only."""
        image = unfiltered(node)
        if image.read_only and any(map(self.is_told_read_only, [image, *self.owned_parts(image)])):
            raise RequestError("Block node is read-only", kind=ErrorKind.READ_ONLY)

    def is_added(self, node: BlockNode) -> bool:
        """Whether a node was added by options and stays until `remove`."""
        return node.node_name in self._added

    def generate_name(self) -> str:
        """Make a node name that is not in use."""
        return next(self._generated_names)

    def _generate_names(self) -> Iterator[str]:
        return (name for name in map("#block{:03}".format, count(1)) if name not in self._nodes)

    # -- opening ------------------------------------------------------------------------------

    async def open(self, options: Mapping[str, object]) -> BlockNode:
        """Open a node by BlockdevOptions, with the nodes inside them; it stays until `remove`.

        Raises:   RequestError, ImageError, StorageError: something cannot be opened.
        Fails to: nothing was opened.
        """
        checked = check_blockdev(options, is_text=False)
        if "node-name" not in checked:
            raise RequestError("'node-name' must be specified for the root node")
        node = await self._join(lambda opening: opening.open_node(checked))
        self._added.add(node.node_name)
        return node

    async def open_unnamed(self, checked: Options) -> BlockNode:
        """Open a node by options that are checked; it stays until its last user leaves."""
        node = await self._join(lambda opening: opening.open_node(checked))
        self._awaiting_user.add(node.node_name)
        return node

    async def open_image(
        self,
        filename: str,
        format_name: str | None,
        *,
        read_only: bool,
        node_name: str | None = None,
        has_backing: bool = True,
        backing_format: str | None = None,
        lock_mode: LockMode = LockMode.USUAL,
    ) -> BlockNode:
        """Open an image with its recorded backing chain; `blkstream:` before the name adds copy-on-read.

        `has_backing`: False leaves the chain out, for those who only look at the image.
        `backing_format`: of its backing file, if the image records one without its format.

        The image stays until its last user leaves. Without a format the extension and the content have
        to agree on one.

        Raises:   RequestError, ImageError, StorageError: an image of the chain cannot be opened.
        Fails to: nothing was opened.
        """
        plain = filename.removeprefix(COPY_ON_READ_PREFIX)
        path = given_path(plain)

        async def work(opening: Opening) -> BlockNode:
            name = opening.claim_name(node_name)
            image_name = name if plain == filename else opening.claim_name()
            image = await opening.open_named(
                path, format_name, image_name, read_only=read_only, lock_mode=lock_mode
            )
            if has_backing:
                unrecorded = Unrecorded(backing_format, "with the option backing-format")
                await opening.open_recorded_backing(image, lock_mode, unrecorded)
            return image if plain == filename else opening.add(copy_on_read(image, name))

        node = await self._join(work)
        self._awaiting_user.add(node.node_name)
        return node

    async def open_overlay(
        self,
        filename: str,
        format_name: str,
        active: BlockNode,
        *,
        node_name: str | None = None,
        find: Find | None = None,
    ) -> OverlayNode:
        """Open an image that records `active` as its backing file, to be put on top of that.

        `find`: finds the file; without it, the name does.

        It stays until its last user leaves.

        Raises:   RequestError: it is no image, no overlay of `active`, smaller, or one image too many.
        Fails to: nothing was opened.
        """
        path = given_path(filename)

        async def work(opening: Opening) -> OverlayNode:
            name = opening.claim_name(node_name)
            image = await opening.open_named(path, format_name, name, read_only=False, find=find)
            overlay = await checked_overlay(self.image_paths, image, active)
            check_chain(overlay, active)
            return overlay

        overlay = await self._join(work)
        self._awaiting_user.add(overlay.node_name)
        return overlay

    async def restore(
        self, nodes: Sequence[Restored], allowed_files: Iterable[str], attempt: Attempt
    ) -> None:
        """Open the nodes of an earlier run, each after those below it; then see that all have users.

        The graph has to be empty. `attempt` opens one node and tells whether it is there; it decides what
        becomes of errors.

        Raises:   what `attempt` raises; what was opened before stays open.
        """
        names = {node.node_name for node in nodes}
        self._generated_names = (name for name in self._generate_names() if name not in names)
        names_before = {*allowed_files}
        for filename in names_before:
            self.image_paths.allow(filename)

        async def open_one(node: Restored) -> None:
            checked = check_blockdev(node.options, is_text=False)
            restored = node._replace(options=checked)
            # What was opened because an image names it is not thereby named by a user.
            await self._join(lambda opening: opening.restore_node(restored), allows=names_before)
            if node.is_added:
                self._added.add(node.node_name)

        are_there = [await attempt(node, partial(open_one, node)) for node in nodes]
        if all(are_there):
            for filename in names_before:
                self.image_paths.disallow(filename)

    async def _join(
        self, work: Callable[[Opening], Awaitable[Result]], *, allows: Container[str] | None = None
    ) -> Result:
        """Let `work` open nodes; they join the graph when all of it went well.

        Images may name the files that `work` was told to open (if given: those in `allows`), while they are.
        """
        async with self._lock:
            opening = Opening(
                DRIVERS,
                FORMATS,
                ImagePaths(on=self.image_paths),
                self._nodes,
                self._generated_names,
                find_throttle_group=self.find_throttle_group,
            )
            try:
                result = await work(opening)
                await opening.check_permissions()
            except BaseException:
                await opening.close()
                raise
            for opened in opening.opened:
                self._nodes.add(opened)
                self._on_opened(opened)
            self._suspects.update((node, None) for node in opening.opened if not self.parents(node))
            self._options.update(opening.options)
            self._told_read_only |= opening.told_read_only
            for file, location in opening.allowed.items():
                if allows is None or location in allows:
                    self.image_paths.allow(location, file)
            return result

    # -- reopening ----------------------------------------------------------------------------

    async def set_read_only(self, node: BlockNode, read_only: bool) -> None:
        """Make an image read-only or writable, with its file unless that was added as a node of its own.

        Needs:    no request to the image is in flight.
        Raises:   RequestError, ImageError, StorageError: it cannot be, or somebody else uses the file.
        Fails to: the image is as before.
        """
        async with self._lock:
            image = unfiltered(node)
            if image.read_only != read_only:
                plan = self.reopening(image, read_only)
                if not read_only:
                    self._check_may_write(image)
                await self._nodes.locks.take(self.permissions.require(plan=plan))
                try:
                    await self._reopen(plan.read_only, read_only)
                    self._on_opened(image)
                finally:
                    self._nodes.refresh(*plan.read_only)
                    self._nodes.refresh_filters(image)

    def _check_may_write(self, image: BlockNode) -> None:
        for role, below in image.children().items():
            if role != "backing" and below.read_only and below.node_name in self._added:
                raise RequestError("Block node is read-only", kind=ErrorKind.READ_ONLY)
        for file in files_of(image):
            check_unshared(file, self._nodes.same_files(file, read_only=False), use_if_writable(file))

    def owned_parts(self, image: BlockNode) -> Iterator[BlockNode]:
        """The nodes that hold what an image is made of, unless they were added as nodes of their own."""
        for role, below in image.children().items():
            if role != "backing" and below.node_name not in self._added:
                yield below
                yield from self.owned_parts(below)

    def reopening(self, image: BlockNode, read_only: bool) -> Plan:
        """What becomes read-only or writable with an image, in the order in which that can be done."""
        nodes = [image, *(part for part in self.owned_parts(image) if part.read_only != read_only)]
        return Plan({}, dict.fromkeys(nodes if read_only else nodes[::-1], read_only))

    @uninterrupted
    async def _reopen(self, nodes: Iterable[BlockNode], read_only: bool) -> None:
        async with AsyncExitStack() as undo:
            for node in nodes:
                await node.reopen(read_only=read_only)
                undo.push_async_callback(node.reopen, read_only=not read_only)
            undo.pop_all()

    # -- using --------------------------------------------------------------------------------

    def add_user(self, node: BlockNode, user: str) -> None:
        """Note that `user` (words for people: ``device 'vda'``) needs a node."""
        self._users.setdefault(node.node_name, []).append(user)
        self._nodes.touch(node)
        self._awaiting_user.discard(node.node_name)

    def remove_user(self, node: BlockNode, user: str) -> None:
        """Take that back; `close_unused` then closes the node if it was the last."""
        self._users[node.node_name].remove(user)
        self._nodes.touch(node)
        self._suspects[node] = None

    def insert(self, node: BlockNode, user: str, *others: str) -> None:
        """Take in a node that its user made and closes, such as the filter of a job."""
        self._nodes.add(node)
        self._users[node.node_name] = [user, *others]

    def take_out(self, node: BlockNode, user: str = "") -> list[str]:
        """Forget a node that was inserted, without closing it; returns who else than `user` uses it."""
        users = self._users[node.node_name]
        self._forget(node)
        return [other for other in users if other != user]

    # -- linking ------------------------------------------------------------------------------

    def connect(
        self, parent: BlockNode, role: str, child: BlockNode | None, move: Move | None = None
    ) -> None:
        """Put a node below another one, in the place of what is there in that role; None: nothing.

        `move`: what has an image go on in the file `child`.

        Raises:   RequestError: `parent` would stand below itself.
        """
        if child is not None:
            check_acyclic(parent, role, child)
        if (before := parent.children().get(role)) is not None:
            self._suspects[before] = None
        if role == "backing":
            parent.backing = child
        elif move is not None:
            move()
        else:
            assert isinstance(parent, FilterNode | RawImage | RawPart) and child is not None
            parent.stand_before(child)
        self._nodes.refresh(parent)
        if role != "backing":
            self._nodes.refresh_filters(parent)

    # -- closing ------------------------------------------------------------------------------

    async def remove(self, node_name: str) -> None:
        """Close a node that was added by options, and what only it used.

        Raises:   RequestError: no such node, not added by options, or in use.
        """
        async with self._lock:
            node = self[node_name]
            self.require_no_overlay(node)
            if self.users(node):
                raise RequestError(f"Node {node_name} is in use")
            if node_name not in self._added:
                raise RequestError(f"Node {node_name} is not owned by the monitor")
            if self.parents(node):
                raise RequestError(f"Block device {node_name} is in use")
            self.disown(node)
            await self._close_unused_locked()

    def disown(self, node: BlockNode) -> None:
        """Let a node go with its last user, though it was added by options."""
        self._added.discard(node.node_name)
        self._nodes.touch(node)
        self._suspects[node] = None

    async def close_unused(self) -> None:
        """Close all nodes that nobody needs any more."""
        async with self._lock:
            await self._close_unused_locked()

    async def _close_unused_locked(self) -> None:
        while self._suspects:
            node, _ = self._suspects.popitem()
            if self._nodes.get(node.node_name) is node and not self._is_needed(node):
                self._forget(node)
                await self._close_node(node)

    def _is_needed(self, node: BlockNode) -> bool:
        is_kept = node.node_name in self._added or node.node_name in self._awaiting_user
        return is_kept or bool(self.users(node) or self.parents(node))

    async def close(self) -> None:
        """Close every node, each as soon as those above it are closed; the graph is empty then.

        So one that hangs keeps only those below it; `unclosed` tells.

        Needs:    nobody opens or closes any more; who does hangs, and is not waited for.
        """
        closing: dict[BlockNode, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            above = {node: [parent for parent, _ in self.parents(node)] for node in self._nodes.values()}
            next_ones = [node for node, parents in above.items() if not parents]
            turns = Turns()
            while next_ones:
                await turns.pass_on()
                node = next_ones.pop()
                below = self._nodes.below(node)
                self._forget(node)
                waited_for = [closing[parent] for parent in above[node]]
                closing[node] = tasks.create_task(self._close_after(waited_for, node))
                next_ones += [child for child in below if not self.parents(child) and child not in closing]

    async def _close_after(self, closing: Sequence[asyncio.Task[None]], node: BlockNode) -> None:
        self._unclosed[node.node_name] = node
        if closing:
            await asyncio.wait(closing)
        await self._close_node(node)
        del self._unclosed[node.node_name]

    @property
    def unclosed(self) -> list[str]:
        """The files of the nodes that `close` is still closing."""
        return sorted({file.filename for node in self._unclosed.values() for file in files_of(node)})

    def _forget(self, node: BlockNode) -> None:
        self._suspects.update(dict.fromkeys(self._nodes.below(node)))
        self._nodes.remove(node)
        self.image_paths.disallow(owner=node)
        self._users.pop(node.node_name, None)
        self._options.pop(node.node_name, None)
        self._added.discard(node.node_name)
        self._told_read_only.discard(node.node_name)
        self._awaiting_user.discard(node.node_name)

    async def _close_node(self, node: BlockNode) -> None:
        await unpinned(node)
        try:
            with unthrottled_files(node):  # it may have to write more than the limits let pass in time
                await node.close()
        except BlockdError as error:
            # Nobody is left who could act on it; the node is let go all the same.
            log.error("closing node %s (%s) failed: %s", node.node_name, node.filename, error.message)


def _no_throttle_group(name: str) -> ThrottleGroup:
    raise RequestError(f"Throttle group '{name}' does not exist")
