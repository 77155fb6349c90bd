"""The node graph: every node by its name, who uses it, and when it goes.

A node stays while anyone needs it: a node above it, a user (a device, an export, a job), or the
client who added it by options and has not removed it. What nobody needs any more is closed, the
upper nodes before the lower ones.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import count
from types import MappingProxyType
from typing import TypeVar

from blockd.aio import in_thread
from blockd.block.chain import format_of, unfiltered
from blockd.block.image_paths import ImagePaths, without_protocol
from blockd.block.node import BlockNode, FilterNode, OverlayNode, ProtocolNode
from blockd.block.options import Options, check_options
from blockd.drivers.opening import Opening, Restored
from blockd.drivers.sharing import check_chain, check_single_writer, check_unshared, file_of, files_of
from blockd.drivers.table import DRIVERS, FORMATS, copy_on_read
from blockd.errors import BlockdError, ErrorKind, RequestError
from blockd.filters.throttle_group import ThrottleGroup
from blockd.protocols.file_status import status_of_name
from blockd.protocols.image_lock import LockMode

log = logging.getLogger(__name__)

COPY_ON_READ_PREFIX = "blkstream:"

Result = TypeVar("Result")


def check_blockdev(options: Mapping[str, object], *, is_text: bool, path: str = "") -> Options:
    """Check BlockdevOptions without opening anything; `is_text`: all values are strings still.

    `path`: where they stand, for errors.

    Raises:   RequestError: an option is unknown, missing or of the wrong type.
    """
    fields = {name: driver.fields for name, driver in DRIVERS.items()}
    return check_options(options, fields, is_text=is_text, path=path)


class NodeGraph:
    """All nodes of the daemon."""

    def __init__(
        self,
        paths: ImagePaths | None = None,
        find_throttle_group: Callable[[str], ThrottleGroup] | None = None,
    ) -> None:
        self._paths = paths or ImagePaths()
        self.find_throttle_group = find_throttle_group or _no_throttle_group
        self._nodes: dict[str, BlockNode] = {}
        self._users: dict[str, list[str]] = {}
        # Nodes that stay without being used: those added by options, and new ones until their first user.
        self._added: set[str] = set()
        self._awaiting_user: set[str] = set()
        # Only one change at a time: what an opening has checked still holds when it is done.
        self._lock = asyncio.Lock()
        self._generated_names = self._generate_names()
        # What each node was told that was opened by options.
        self._options: dict[str, Options] = {}

    # -- looking ------------------------------------------------------------------------------

    @property
    def nodes(self) -> Mapping[str, BlockNode]:
        """All nodes by name, in the order they were opened."""
        return MappingProxyType(self._nodes)

    def __getitem__(self, node_name: str) -> BlockNode:
        """Find a node.

        Raises:   RequestError: there is none of this name.
        """
        if node_name not in self._nodes:
            raise RequestError(f"Failed to find node with node-name='{node_name}'")
        return self._nodes[node_name]

    def parents(self, node: BlockNode) -> Iterator[tuple[BlockNode, str]]:
        """The nodes right above, each with the role in which it uses `node`: ``file``, ``backing``."""
        for parent in self._nodes.values():
            for role, child in parent.children().items():
                if child is node:
                    yield parent, role

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

    def is_added(self, node: BlockNode) -> bool:
        """Whether a node was added by options and stays until `remove`."""
        return node.node_name in self._added

    @property
    def allowed_files(self) -> list[str]:
        """The files that users have named, and images may name therefore."""
        return self._paths.allowed_files

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
        lock_mode: LockMode = LockMode.USUAL,
    ) -> BlockNode:
        """Open an image with its recorded backing chain; `blkstream:` before the name adds copy-on-read.

        `has_backing`: False leaves the chain out, for those who only look at the image.

        The image stays until its last user leaves. Without a format the extension and the content have
        to agree on one.

        Raises:   RequestError, ImageError, StorageError: an image of the chain cannot be opened.
        Fails to: nothing was opened.
        """
        plain = filename.removeprefix(COPY_ON_READ_PREFIX)
        path = without_protocol(plain)

        async def work(opening: Opening) -> BlockNode:
            await in_thread(self._paths.allow_file, path)
            name = opening.claim_name(node_name)
            image_name = name if plain == filename else opening.claim_name()
            image = await opening.open_image(
                path, format_name, image_name, read_only=read_only, lock_mode=lock_mode
            )
            if has_backing:
                await opening.open_recorded_backing(image, lock_mode)
            return image if plain == filename else opening.add(copy_on_read(image, name))

        node = await self._join(work)
        self._awaiting_user.add(node.node_name)
        return node

    async def open_overlay(
        self, filename: str, format_name: str, active: BlockNode, *, node_name: str | None = None
    ) -> OverlayNode:
        """Open an image that records `active` as its backing file, and put it on top of that.

        It stays until its last user leaves.

        Raises:   RequestError: it is no image, no overlay of `active`, smaller, or one image too many.
        Fails to: nothing was opened.
        """
        path = without_protocol(filename)

        async def work(opening: Opening) -> OverlayNode:
            await in_thread(self._paths.allow_file, path)
            name = opening.claim_name(node_name)
            image = await opening.open_image(path, format_name, name, read_only=False)
            overlay = await self._checked_overlay(image, active)
            overlay.backing = active
            check_chain(overlay)
            return overlay

        overlay = await self._join(work)
        self._awaiting_user.add(overlay.node_name)
        return overlay

    async def _checked_overlay(self, image: BlockNode, active: BlockNode) -> OverlayNode:
        if not isinstance(image, OverlayNode) or not image.backing_filename:
            raise RequestError(
                f"'{image.filename}' has no backing file; it must be an overlay of '{active.filename}'"
            )
        backing = await in_thread(self._paths.resolve, image.backing_filename, image.filename)
        file = file_of(active)
        if file is None or await in_thread(_identity, backing, image.filename) != file.identity():
            raise RequestError(
                f"The backing file of '{image.filename}' is '{backing}', not the active image "
                f"'{active.filename}'"
            )
        if image.backing_format not in (None, format_of(active)):
            raise RequestError(
                f"'{image.filename}' records the format '{image.backing_format}' for its backing file "
                f"'{active.filename}', which is '{format_of(active)}'"
            )
        if image.size < active.size:
            raise RequestError(
                f"'{image.filename}' has {image.size} bytes, fewer than the {active.size} of "
                f"'{active.filename}'"
            )
        return image

    async def restore(self, nodes: Sequence[Restored], allowed_files: Iterable[str]) -> None:
        """Open the nodes of an earlier run, each after those below it; then see that all have users.

        The graph has to be empty.

        Raises:   RequestError, ImageError, StorageError: a node cannot be opened.
        Fails to: nothing was opened.
        """
        for filename in allowed_files:
            await in_thread(self._paths.allow_file, filename)
        names = {node.node_name for node in nodes}
        self._generated_names = (name for name in self._generate_names() if name not in names)

        async def work(opening: Opening) -> None:
            for node in nodes:
                await opening.restore_node(node._replace(options=check_blockdev(node.options, is_text=False)))

        # What was opened because an image names it is not thereby named by a user.
        await self._join(work, paths=self._paths.copy())
        self._added.update(node.node_name for node in nodes if node.is_added)

    async def _join(
        self, work: Callable[[Opening], Awaitable[Result]], *, paths: ImagePaths | None = None
    ) -> Result:
        """Let `work` open nodes; they join the graph when all of it went well."""
        async with self._lock:
            opening = Opening(
                DRIVERS,
                FORMATS,
                paths or self._paths,
                self._nodes,
                self._generated_names,
                find_throttle_group=self.find_throttle_group,
            )
            try:
                result = await work(opening)
            except BaseException:
                await opening.close()
                raise
            self._nodes.update((opened.node_name, opened) for opened in opening.opened)
            self._options.update(opening.options)
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
                if not read_only:
                    self._check_may_write(image)
                await self._reopen(image, read_only)
                self.refresh_filters(image)

    def _check_may_write(self, image: BlockNode) -> None:
        for role, below in image.children().items():
            if role == "backing":
                continue
            if below.read_only and below.node_name in self._added:
                raise RequestError("Block node is read-only", kind=ErrorKind.READ_ONLY)
            check_single_writer(below, self._nodes.values(), image.node_name, read_only=False)
        for file in files_of(image):
            check_unshared(file, self._nodes.values(), read_only=False)

    def owned_parts(self, image: BlockNode) -> Iterator[BlockNode]:
        """The nodes that hold what an image is made of, unless they were added as nodes of their own."""
        for role, below in image.children().items():
            if role != "backing" and below.node_name not in self._added:
                yield below
                if not isinstance(below, ProtocolNode):
                    yield from self.owned_parts(below)

    async def _reopen(self, image: BlockNode, read_only: bool) -> None:
        nodes = [image, *(part for part in self.owned_parts(image) if part.read_only != read_only)]
        if not read_only:
            nodes.reverse()
        async with AsyncExitStack() as undo:
            for node in nodes:
                await node.reopen(read_only=read_only)
                undo.push_async_callback(node.reopen, read_only=not read_only)
            undo.pop_all()

    def refresh_filters(self, node: BlockNode) -> None:
        """Let the filters in front of a node know what became of it."""
        for parent, _ in self.parents(node):
            if isinstance(parent, FilterNode):
                parent.stand_before(node)
                self.refresh_filters(parent)

    # -- using --------------------------------------------------------------------------------

    def add_user(self, node: BlockNode, user: str) -> None:
        """Note that `user` (words for people: ``device 'vda'``) needs a node."""
        self._users.setdefault(node.node_name, []).append(user)
        self._awaiting_user.discard(node.node_name)

    def remove_user(self, node: BlockNode, user: str) -> None:
        """Take that back; `close_unused` then closes the node if it was the last."""
        self._users[node.node_name].remove(user)

    def insert(self, node: BlockNode, user: str) -> None:
        """Take in a node that its user made and closes, such as the filter of a job."""
        self._nodes[node.node_name] = node
        self._users[node.node_name] = [user]

    def take_out(self, node: BlockNode) -> None:
        """Forget a node that was inserted, without closing it."""
        del self._nodes[node.node_name]
        del self._users[node.node_name]

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
            if any(self.parents(node)):
                raise RequestError(f"Block device {node_name} is in use")
            self._added.discard(node_name)
            await self._close_unused_locked()

    async def close_unused(self) -> None:
        """Close all nodes that nobody needs any more."""
        async with self._lock:
            await self._close_unused_locked()

    async def _close_unused_locked(self) -> None:
        while unused := [node for node in self._nodes.values() if not self._is_needed(node)]:
            await self._close(unused)

    def _is_needed(self, node: BlockNode) -> bool:
        kept = node.node_name in self._added or node.node_name in self._awaiting_user
        return kept or bool(self.users(node)) or any(self.parents(node))

    async def close(self) -> None:
        """Close every node; the graph is empty then."""
        async with self._lock:
            while self._nodes:
                await self._close([node for node in self._nodes.values() if not any(self.parents(node))])

    async def _close(self, nodes: Iterable[BlockNode]) -> None:
        for node in nodes:
            del self._nodes[node.node_name]
            self._users.pop(node.node_name, None)
            self._options.pop(node.node_name, None)
            self._added.discard(node.node_name)
            self._awaiting_user.discard(node.node_name)
            try:
                await node.close()
            except BlockdError as error:
                # Nobody is left who could act on it; the node is let go all the same.
                log.error("closing node %s (%s) failed: %s", node.node_name, node.filename, error.message)


def _no_throttle_group(name: str) -> ThrottleGroup:
    raise RequestError(f"Throttle group '{name}' does not exist")


def _identity(path: str, image: str) -> tuple[int, int]:
    """Device and inode of the backing file of `image`, which need not be one that may be opened."""
    try:
        return status_of_name(path).identity
    except OSError as error:
        raise RequestError(
            f"Could not open backing file of '{image}': Could not open '{path}': {error.strerror}"
        ) from error
