"""One attempt to open nodes: all of them join the graph together, or all are closed again.

Openers (table.py) get an `Opening` and ask it for what stands below their node. Whatever they open is
noted here, so that a chain which fails half way leaves no open file behind.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import chain as joined
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from blockd.block.chain import chain
from blockd.block.image_paths import ImagePaths
from blockd.block.moving import take_over_size
from blockd.block.node import BlockNode, OverlayNode, ProtocolNode
from blockd.block.options import Fields, Options
from blockd.block.permissions import EVERYTHING, Access, Permission, access_to_file
from blockd.block.probe import PROBE_LENGTH, Signature, UnknownFormat, probe_format
from blockd.block.settings import Cache, DetectZeroes, Settings
from blockd.drivers.nodes import Nodes
from blockd.drivers.permissions import Claim, check_acyclic
from blockd.drivers.sharing import (
    CHAIN_DEPTH_MAX,
    check_chain,
    check_unshared,
    file_of,
    files_of,
    folder_of,
    use_of,
)
from blockd.drivers.uses import Uses
from blockd.errors import BlockdError, ErrorKind, RequestError, printable
from blockd.filenames import full_name, recorded_image
from blockd.filters.throttle_group import ThrottleGroup
from blockd.formats.raw.image import RawImage
from blockd.found_files import FoundFile
from blockd.protocols.file import FileNode
from blockd.protocols.image_lock import LockMode
from blockd.protocols.opening import Find

if TYPE_CHECKING:
    from blockd.formats.add_cow.image import AddCowImage
    from blockd.formats.check_report import CheckReport, Repair

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
    # Somebody has said so; others are read-only because they are backing files.
    is_told_read_only: bool = False

    @property
    def node_name(self) -> str:
        return str(self.options["node-name"])


class Unrecorded(NamedTuple):
    """What there is to do where an image does not record the format of its backing file.

    QED records ``raw`` or nothing, and qcow2 need not. The content does not decide: the guest of a raw image
    may have written it. So the user has to tell, unless name and content agree.
    """

    format_name: str | None
    # Where the user can tell it.
    hint: str


IN_OPTIONS = Unrecorded(None, "in the node's option 'backing' (backing.driver=FORMAT,…)")


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
    # attach(opening, image, lock_mode, above): opens what such an image has beside its file and its backing.
    attach: Callable[["Opening", BlockNode, LockMode, Sequence[BlockNode]], Awaitable[None]] | None = None
    # Absent: there is nothing in such an image that could be wrong.
    check: "Callable[[ProtocolNode], Awaitable[CheckReport]] | None" = None
    repair: "Callable[[ProtocolNode, Repair], Awaitable[CheckReport]] | None" = None
    # Members of QEMU's ImageInfo beside those of every format; of an open image, and blocking.
    info: Callable[[BlockNode], Mapping[str, object]] | None = None


class Opening:
    """Opens nodes with what the graph knows: drivers, formats, allowed paths, and the nodes that exist."""

    def __init__(
        self,
        drivers: Mapping[str, Driver],
        formats: Mapping[str, Format],
        paths: ImagePaths,
        present: Nodes,
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
        # The files that images may name from now on, and where they are.
        self.allowed: dict[FileNode, str] = {}
        # What the nodes were told that were opened by options.
        self.options: dict[str, Options] = {}
        # Those that are read-only because somebody said so.
        self.told_read_only: set[str] = set()

    async def close(self) -> None:
        """Close what was opened, the last first: it stands above the others."""
        async with AsyncExitStack() as stack:
            for node in self.opened:
                stack.push_async_callback(node.close)

    # -- by options ---------------------------------------------------------------------------

    async def open_node(self, options: Options, *, is_told_read_only: bool | None = None) -> BlockNode:
        """Open a node and what stands below it; what the client has said of it is in `options` by default."""
        name = options.get("node-name")
        assert name is None or isinstance(name, str)
        if is_told_read_only is None:
            is_told_read_only = bool(options.get("read-only"))
        return await self._open_node(options, self.claim_name(name), is_told_read_only)

    async def _open_node(self, options: Options, name: str, is_told_read_only: bool) -> BlockNode:
        if is_told_read_only:
            self.told_read_only.add(name)
        settings = settings_of(options)  # nothing is opened if they contradict each other
        wanted = Wanted(options, name, bool(options.get("read-only")))
        if options.get("force-share") and not wanted.read_only:
            raise RequestError("force-share=on can only be used with read-only images")
        node = await self._drivers[str(options["driver"])].open(self, wanted)
        self.options[node.node_name] = options
        node.settings = settings
        self._pass_on_cache(node)
        check_chain(node)
        return node

    def _pass_on_cache(self, node: BlockNode) -> None:
        """Let what was opened below a node because images name it have the cache settings of the node."""
        for child in node.children().values():
            if child in self.opened and child.node_name not in self.options:
                child.settings = child.settings._replace(cache=node.settings.cache)
                self._pass_on_cache(child)

    async def restore_node(self, restored: Restored) -> None:
        """Open a node again, under its name even if that was generated."""
        name, is_told_read_only = restored.node_name, restored.is_told_read_only
        if restored.backings is None:
            await self._open_node(restored.options, name, is_told_read_only)
            return
        image = await self._open_node({**restored.options, "backing": None}, name, is_told_read_only)
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
            self.set_backing(image, self._find(backing, "the node '{}', its backing, is not restored"))
        check_chain(image)

    async def child(self, wanted: Wanted, role: str, *, read_only: bool | None = None) -> BlockNode:
        """Find or open the node that stands below in `role`; what it is not told it inherits."""
        told = wanted.options[role]
        if isinstance(told, str):
            found = self._find(told)
            take_over_size(found)
            return found
        assert isinstance(told, dict)
        inherited: Options = {
            "read-only": wanted.read_only if read_only is None else read_only,
            "auto-read-only": wanted.may_be_read_only,
            "force-share": bool(wanted.options.get("force-share")),
            "discard": "unmap",  # what is to be ignored does not come down here
        }
        if cache := {**_flags(wanted.options, "cache"), **_flags(told, "cache")}:
            told = {**told, "cache": cache}
        is_told_read_only = role != "backing" and wanted.node_name in self.told_read_only
        if "read-only" in told:
            is_told_read_only = bool(told["read-only"])
        return await self.open_node({**inherited, **told}, is_told_read_only=is_told_read_only)

    async def file(self, wanted: Wanted, role: str = "file", *, is_shared: bool = False) -> ProtocolNode:
        """Find or open the node that holds the bytes of a format.

        `is_shared`: the format needs no more of it than its own users do.
        """
        node = await self.child(wanted, role)
        if not isinstance(node, ProtocolNode):
            raise RequestError(
                f"The '{wanted.options['driver']}' driver needs a protocol node as its file, and "
                f"'{node.node_name}' is of driver '{node.driver}'"
            )
        self.require_written(wanted, node)
        if not is_shared:
            is_writable = not (wanted.read_only or node.read_only)
            await self.check_file(node, wanted.node_name, role, is_writable=is_writable)
        return node

    def require_written(self, wanted: Wanted, below: BlockNode) -> None:
        """Refuse a node that cannot be written below one that is to be."""
        if below.read_only and not (wanted.read_only or wanted.may_be_read_only):
            raise RequestError("Block node is read-only", kind=ErrorKind.READ_ONLY)

    async def check_file(self, file: BlockNode, node_name: str, role: str, *, is_writable: bool) -> None:
        """See that a format, `node_name`, can have a file before it looks into it, and lock that."""
        access = access_to_file(Access(Permission.NONE, EVERYTHING), is_writable=is_writable)
        await self.check_permissions(Claim(file, *access, by=f"node '{node_name}'", role=role))

    async def check_permissions(self, *claims: Claim) -> None:
        """See that what was opened can stand beside what there is, with these claims; lock files for that.

        Raises:   RequestError: who is in the way of whom.
        """
        permissions, draft = self._present.permissions, Uses(self._present.permissions.uses)
        nodes = joined(self._present.values(), self.opened)
        permissions.require_draft(draft, self.opened, claims, nodes)
        await self._present.locks.take(draft, self.opened)

    def set_backing(self, image: BlockNode, backing: BlockNode) -> None:
        """Put an image that was opened on its backing."""
        check_acyclic(image, "backing", backing)
        image.backing = backing

    def _find(self, name: str, complaint: str = "Cannot find device='{0}' nor node-name='{0}'") -> BlockNode:
        for node in self.opened:
            if node.node_name == name:
                return node
        if name not in self._present:
            raise RequestError(complaint.format(name), missing_node=name)
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

    def allow(self, node: BlockNode) -> None:
        """Let images name the file of a node, which the user has named."""
        file = file_of(node)
        if file is not None:
            self.allowed[file] = file.location()
            self.paths.allow(self.allowed[file])

    async def open_file(
        self,
        find: Find,
        node_name: str,
        *,
        read_only: bool,
        may_be_read_only: bool = False,
        lock_mode: LockMode = LockMode.USUAL,
        above: Sequence[BlockNode] = (),
        opener: type[FileNode] = FileNode,
    ) -> FileNode:
        """Open a file, unless that would bring it into use twice; `above`: the chain it becomes part of."""
        file = await opener.open(
            find,
            node_name=node_name,
            read_only=read_only,
            may_be_read_only=may_be_read_only,
            lock_mode=lock_mode,
            check=partial(self._check_file, above=above),
        )
        self._present.locks.note(file)
        return self.add(file)

    def _check_file(self, file: FileNode, above: Sequence[BlockNode]) -> None:
        """Refuse a file that is in use here: by name, so it comes before what a lock can say."""
        for other in (other for node in above for other in files_of(node)):
            if other.identity() == file.identity():
                raise RequestError(
                    f"The backing chain is a loop: '{file.filename}' is the same file as '{other.filename}' "
                    "above it"
                )
        same_files = joined(self._present.same_files(file, read_only=file.read_only), self.opened)
        check_unshared(file, same_files, use_of(file))

    def require_format(self, format_name: str | None, filename: str) -> None:
        """Refuse a format that is none before the file is looked for; None is one that is to be found out."""
        if format_name is not None and format_name not in self._formats:
            raise RequestError(f"Could not open '{filename}': Unknown driver '{printable(format_name)}'")

    async def open_named(
        self,
        path: str,
        format_name: str | None,
        node_name: str,
        *,
        read_only: bool,
        lock_mode: LockMode = LockMode.USUAL,
        find: Find | None = None,
    ) -> BlockNode:
        """Open an image that the user has named, without its backing; images may name it from now on.

        `find`: finds the file; without it, the path does.
        """
        self.require_format(format_name, path)
        found = find or partial(FoundFile.find, path)
        image = await self.open_image(found, format_name, node_name, read_only=read_only, lock_mode=lock_mode)
        self.allow(image)
        return image

    async def open_image(
        self,
        find: Find,
        format_name: str | None,
        node_name: str,
        *,
        read_only: bool,
        lock_mode: LockMode = LockMode.USUAL,
        above: Sequence[BlockNode] = (),
    ) -> BlockNode:
        """Open an image file without its backing; without a format, name and content have to agree on one.

        Needs:    `require_format` has let the format pass.
        """
        file = await self.open_file(
            find, self.claim_name(), read_only=read_only, lock_mode=lock_mode, above=above
        )
        if format_name is None:
            signatures = {name: entry.signature for name, entry in self._formats.items()}
            first_bytes = bytes(await file.read(0, PROBE_LENGTH))
            format_name = probe_format(file.filename, first_bytes, signatures)
        entry = self._formats[format_name]
        image = await entry.open(file, node_name, read_only)
        if entry.attach is not None:
            await entry.attach(self, image, lock_mode, above)
        return self.add(image)

    async def attach_recorded_image(
        self, overlay: "AddCowImage", lock_mode: LockMode, above: Sequence[BlockNode] = ()
    ) -> None:
        """Open the image that an add-cow file records, and attach it."""
        try:
            image = await self.open_image(
                partial(self.paths.find, overlay.image_filename, folder_of(overlay), "image file"),
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

    async def open_recorded_backing(
        self,
        top: BlockNode,
        lock_mode: LockMode = LockMode.USUAL,
        unrecorded: Unrecorded = IN_OPTIONS,
    ) -> None:
        """Open the backing files that `top` and the images below it record, read-only.

        `unrecorded`: of the backing file of `top`, and of no other one.
        """
        node = top
        while isinstance(node, OverlayNode) and node.backing is None and node.backing_filename:
            of_this = unrecorded if node is top else IN_OPTIONS
            node.backing = await self._open_recorded(node, lock_mode, list(chain(top)), of_this)
            node = node.backing

    async def _open_recorded(
        self, image: OverlayNode, lock_mode: LockMode, above: Sequence[BlockNode], unrecorded: Unrecorded
    ) -> BlockNode:
        try:
            if len(above) == CHAIN_DEPTH_MAX:
                raise RequestError(f"The backing chain has more than {CHAIN_DEPTH_MAX} images")
            recorded = recorded_image(image.backing_filename or "")
            # As in QEMU, the format that is recorded beside the name comes first.
            format_name = image.backing_format or recorded.format_name or unrecorded.format_name
            self.require_format(format_name, full_name(image.filename, recorded.filename))
            return await self.open_image(
                partial(self.paths.find, recorded.filename, folder_of(image)),
                format_name,
                self.claim_name(),
                read_only=True,
                lock_mode=lock_mode,
                above=above,
            )
        except UnknownFormat as error:
            hint = RequestError(f"{error.message} {unrecorded.hint}")
            raise _not_opened(f"backing file of '{image.filename}'", hint) from error
        except BlockdError as error:
            raise _not_opened(f"backing file of '{image.filename}'", error) from error


def settings_of(options: Options) -> Settings:
    """What the options of a node say of its requests.

    Raises:   RequestError: they contradict each other.
    """
    cache = _flags(options, "cache")
    settings = Settings(
        Cache(is_direct=bool(cache.get("direct")), is_unsafe=bool(cache.get("no-flush"))),
        DetectZeroes(str(options.get("detect-zeroes", DetectZeroes.OFF))),
        discards=options.get("discard") != "ignore",
    )
    if settings.detect_zeroes is DetectZeroes.UNMAP and options.get("discard") != "unmap":
        raise RequestError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
        )
    if options.get("aio") == "native" and not settings.cache.is_direct:
        raise RequestError(
            "aio=native was specified, but it requires cache.direct=on, which was not specified."
        )
    return settings


def _flags(options: Options, name: str) -> Options:
    """An option that is an object, empty if it is not given."""
    value = options.get(name, {})
    assert isinstance(value, dict)
    return value


def _not_opened(what: str, error: BlockdError) -> RequestError:
    """What is told of a file that an image names: whoever made the image has chosen the name."""
    return RequestError(printable(f"Could not open {what}: {error.message}"), kind=error.kind)
