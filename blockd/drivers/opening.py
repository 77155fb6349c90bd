"""One attempt to open nodes: all of them join the graph together, or all are closed again.

Openers (table.py) get an `Opening` and ask it for what stands below their node. Whatever they open is
noted here, so that a chain which fails half way leaves no open file behind.
"""

import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import chain as joined
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from blockd.aio import in_thread
from blockd.block.chain import chain
from blockd.block.image_paths import ImagePaths
from blockd.block.node import BlockNode, OverlayNode, ProtocolNode
from blockd.block.options import Fields, Options
from blockd.block.probe import PROBE_LENGTH, Signature, probe_format
from blockd.drivers.sharing import CHAIN_DEPTH_MAX, check_chain, check_single_writer, check_unshared, files_of
from blockd.errors import BlockdError, ErrorKind, RequestError, printable
from blockd.filters.throttle_group import ThrottleGroup
from blockd.formats.add_cow.image import AddCowImage
from blockd.formats.check_report import CheckReport, Repair
from blockd.formats.raw.image import RawImage
from blockd.protocols.file import FileNode
from blockd.protocols.image_lock import LockMode

log = logging.getLogger(__name__)

NODE_NAME_LENGTH_MAX = 31

_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)

Node = TypeVar("Node", bound=BlockNode)


class Wanted(NamedTuple):
    """The node that an opener is to open; its options are checked."""

    options: Options
    node_name: str
    read_only: bool

    @property
    def may_be_read_only(self) -> bool:
        """Whether a node that cannot be written may be opened read-only instead."""
        return bool(self.options.get("auto-read-only"))

    @property
    def lock_mode(self) -> LockMode:
        """How the node's files are locked, unless they are told otherwise."""
        return LockMode.FORCE_SHARE if self.options.get("force-share") else LockMode.USUAL


class Restored(NamedTuple):
    """A node of an earlier run.

    What is below it is named in `options`, except a backing: `backings` tells which node that is, by the
    backing file that the image records ("": none, for both).
    """

    options: Options
    backings: Mapping[str, str] | None
    # It stays until `NodeGraph.remove`.
    is_added: bool

    @property
    def node_name(self) -> str:
        return str(self.options["node-name"])


class Driver(NamedTuple):
    """How nodes of one driver are opened, and with which options."""

    open: Callable[["Opening", Wanted], Awaitable[BlockNode]]
    fields: Fields


class Format(NamedTuple):
    """A format: all that is done to its images by file name, whatever it is.

    The functions that look into a file need it unused by others, and those that change it writable.
    """

    open: Callable[[ProtocolNode, str, bool], Awaitable[BlockNode]]
    signature: Signature
    # create(file, size, backing_filename=..., backing_format=..., **options): makes an image in a file,
    # whatever that held before; a format without backing files refuses those two.
    create: Callable[..., Awaitable[None]]
    # What else it can be told, under qemu-img's names, which are those of its arguments too.
    create_options: Fields = MappingProxyType({})
    has_backing: bool = False
    # Absent: there is nothing in such an image that could be wrong.
    check: Callable[[ProtocolNode], Awaitable[CheckReport]] | None = None
    repair: Callable[[ProtocolNode, Repair], Awaitable[CheckReport]] | None = None
    # Members of QEMU's ImageInfo that images of this format have beside those of every format, such as
    # snapshots and format-specific; of an open image, and blocking.
    info: Callable[[BlockNode], Mapping[str, object]] | None = None
    # beside(filename, options): which files `create` makes beside the one it is given, unless they are there.
    beside: Callable[[str, Mapping[str, object]], list[str]] = lambda _filename, _options: []

    def made_files(self, filename: str, options: Mapping[str, object]) -> list[str]:
        """What `create` is going to make, that one file included; for who has to remove it again."""
        return [filename, *(name for name in self.beside(filename, options) if not os.access(name, os.F_OK))]


class Opening:
    """Opens nodes with what the graph knows: drivers, formats, allowed paths, and the nodes that exist."""

    def __init__(
        self,
        drivers: Mapping[str, Driver],
        formats: Mapping[str, Format],
        paths: ImagePaths,
        present: Mapping[str, BlockNode],
        generated_names: Iterator[str],
        *,
        find_throttle_group: Callable[[str], ThrottleGroup],
    ) -> None:
        self._drivers = drivers
        self._formats = formats
        self.paths = paths
        self._present = present
        self._generated_names = generated_names
        self.find_throttle_group = find_throttle_group
        self._names: set[str] = set()
        self.opened: list[BlockNode] = []
        # What the nodes were told that were opened by options.
        self.options: dict[str, Options] = {}

    async def close(self) -> None:
        """Close what was opened, the last first: it stands above the others."""
        async with AsyncExitStack() as stack:
            for node in self.opened:
                stack.push_async_callback(node.close)

    # -- by options ---------------------------------------------------------------------------

    async def open_node(self, options: Options) -> BlockNode:
        """Open a node and what stands below it."""
        name = options.get("node-name")
        assert name is None or isinstance(name, str)
        return await self._open_node(options, self.claim_name(name))

    async def _open_node(self, options: Options, name: str) -> BlockNode:
        wanted = Wanted(options, name, bool(options.get("read-only")))
        if options.get("force-share") and not wanted.read_only:
            raise RequestError("force-share=on can only be used with read-only images")
        node = await self._drivers[str(options["driver"])].open(self, wanted)
        self.options[node.node_name] = options
        check_chain(node)
        return node

    async def restore_node(self, restored: Restored) -> None:
        """Open a node again, under its name even if that was generated."""
        if restored.backings is None:
            await self._open_node(restored.options, restored.node_name)
            return
        image = await self._open_node({**restored.options, "backing": None}, restored.node_name)
        assert isinstance(image, OverlayNode), "only overlays have a backing"
        recorded = image.backing_filename or ""
        backing = restored.backings.get(recorded)
        if backing is None:
            log.warning(
                "'%s' records the backing file '%s' now: it was changed while blockd did not run",
                *(image.filename, printable(recorded)),
            )
            await self.open_recorded_backing(image)
        elif backing:
            image.backing = self._find(backing)
        check_chain(image)

    async def child(self, wanted: Wanted, role: str, *, read_only: bool | None = None) -> BlockNode:
        """Find or open the node that stands below in `role`; what it is not told it inherits."""
        told = wanted.options[role]
        if isinstance(told, str):
            return self._find(told)
        assert isinstance(told, dict)
        inherited: Options = {
            "read-only": wanted.read_only if read_only is None else read_only,
            "auto-read-only": wanted.may_be_read_only,
            "force-share": bool(wanted.options.get("force-share")),
        }
        return await self.open_node({**inherited, **told})

    async def file(self, wanted: Wanted, role: str = "file") -> ProtocolNode:
        """Find or open the node that holds the bytes of a format."""
        node = await self.child(wanted, role)
        if not isinstance(node, ProtocolNode):
            raise RequestError(
                f"The '{wanted.options['driver']}' driver needs a protocol node as its file, and "
                f"'{node.node_name}' is of driver '{node.driver}'"
            )
        if node.read_only and not (wanted.read_only or wanted.may_be_read_only):
            raise RequestError("Block node is read-only", kind=ErrorKind.READ_ONLY)
        check_single_writer(node, self.nodes(), wanted.node_name, read_only=wanted.read_only)
        return node

    def _find(self, name: str) -> BlockNode:
        for node in self.opened:
            if node.node_name == name:
                return node
        if name not in self._present:
            raise RequestError(f"Cannot find device='{name}' nor node-name='{name}'")
        return self._present[name]

    def claim_name(self, wanted: str | None = None) -> str:
        """Take a node name, or generate one; nobody else can have it from here on."""
        if wanted is None:
            return next(self._generated_names)
        if not _NODE_NAME.fullmatch(wanted):
            raise RequestError(f"Invalid node-name: '{printable(wanted)}'")
        if len(wanted) > NODE_NAME_LENGTH_MAX:
            raise RequestError("Node name too long")
        if wanted in self._present or wanted in self._names:
            raise RequestError(f"Duplicate nodes with node-name='{wanted}'")
        self._names.add(wanted)
        return wanted

    def add(self, node: Node) -> Node:
        """Note a node that was opened, so that it is closed if the rest fails."""
        self.opened.append(node)
        return node

    # -- by file name -------------------------------------------------------------------------

    async def open_file(
        self,
        path: str,
        node_name: str,
        *,
        read_only: bool,
        lock_mode: LockMode = LockMode.USUAL,
        above: Sequence[BlockNode] = (),
    ) -> FileNode:
        """Open a file, unless that would bring it into use twice; `above`: the chain it becomes part of."""
        file = await FileNode.open(path, node_name=node_name, read_only=read_only, lock_mode=LockMode.OFF)
        self.add(file)
        for other in (other for node in above for other in files_of(node)):
            if other.identity() == file.identity():
                raise RequestError(
                    f"The backing chain is a loop: '{path}' is the same file as '{other.filename}' above it"
                )
        # Who is in the way is known by name when it is in this process; so it is locked only then.
        check_unshared(file, self.nodes(), read_only=read_only)
        await file.lock(lock_mode)
        return file

    async def open_image(
        self,
        path: str,
        format_name: str | None,
        node_name: str,
        *,
        read_only: bool,
        lock_mode: LockMode = LockMode.USUAL,
        above: Sequence[BlockNode] = (),
    ) -> BlockNode:
        """Open an image file without its backing; without a format, name and content have to agree on one."""
        if format_name is not None and format_name not in self._formats:
            raise RequestError(f"Could not open '{path}': Unknown driver '{printable(format_name)}'")
        file = await self.open_file(
            path, self.claim_name(), read_only=read_only, lock_mode=lock_mode, above=above
        )
        if format_name is None:
            signatures = {name: entry.signature for name, entry in self._formats.items()}
            first_bytes = bytes(await file.read(0, PROBE_LENGTH))
            format_name = probe_format(path, first_bytes, signatures)
        image = await self._formats[format_name].open(file, node_name, read_only)
        if isinstance(image, AddCowImage):
            await self.attach_recorded_image(image, lock_mode, above)
        return self.add(image)

    async def attach_recorded_image(
        self, overlay: AddCowImage, lock_mode: LockMode, above: Sequence[BlockNode] = ()
    ) -> None:
        """Open the image that an add-cow file records, and attach it."""
        try:
            path = await in_thread(self.paths.resolve, overlay.image_filename, overlay.filename, "image file")
            image = await self.open_image(
                path,
                RawImage.driver,
                self.claim_name(),
                read_only=overlay.read_only,
                lock_mode=lock_mode,
                above=[*above, overlay],
            )
        except BlockdError as error:
            raise _not_opened(f"the image file of '{overlay.filename}'", error) from error
        assert isinstance(image, RawImage), "opened as such"
        overlay.attach(image)

    async def open_recorded_backing(self, top: BlockNode, lock_mode: LockMode = LockMode.USUAL) -> None:
        """Open the backing files that `top` and the images below it record, read-only."""
        node = top
        while isinstance(node, OverlayNode) and node.backing is None and node.backing_filename:
            node.backing = await self._open_recorded(node, node.backing_filename, lock_mode, list(chain(top)))
            node = node.backing

    async def _open_recorded(
        self, image: OverlayNode, name: str, lock_mode: LockMode, above: Sequence[BlockNode]
    ) -> BlockNode:
        try:
            if len(above) == CHAIN_DEPTH_MAX:
                raise RequestError(f"The backing chain has more than {CHAIN_DEPTH_MAX} images")
            path = await in_thread(self.paths.resolve, name, image.filename)
            return await self.open_image(
                path,
                image.backing_format,
                self.claim_name(),
                read_only=True,
                lock_mode=lock_mode,
                above=above,
            )
        except BlockdError as error:
            raise _not_opened(f"backing file of '{image.filename}'", error) from error

    def nodes(self) -> Iterator[BlockNode]:
        """The nodes that exist and those that were opened so far."""
        return joined(self._present.values(), self.opened)


def _not_opened(what: str, error: BlockdError) -> RequestError:
    """What is told of a file that an image names: whoever made the image has chosen the name."""
    return RequestError(printable(f"Could not open {what}: {error.message}"), kind=error.kind)
