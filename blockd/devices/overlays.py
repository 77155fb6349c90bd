"""Overlays: another active image for a disk, in one step for its guests.

The image that was active becomes the backing of the new one, and read-only.
"""

import logging
from abc import abstractmethod

from blockd.aio import in_thread, uninterrupted
from blockd.block.chain import format_of, unfiltered
from blockd.block.node import BlockNode, FilterNode, OverlayNode
from blockd.block.permissions import CONSISTENT_READ
from blockd.devices.changes import Change
from blockd.devices.device import Devices
from blockd.devices.streams import Streams
from blockd.drivers import FORMATS
from blockd.drivers.permissions import check_acyclic
from blockd.drivers.sharing import check_chain, files_of
from blockd.errors import BlockdError, ErrorKind, RequestError, printable
from blockd.filenames import absolute, given_path, recordable
from blockd.filters.blkstream import BlkStream
from blockd.protocols.new_file import MadeFile, new_file, sync_folder

log = logging.getLogger(__name__)

DEFAULT_FORMAT = "qcow2"

_USER = "snapshot"


class PutOverlay(Change):
    """Puts an overlay in the place of an image; what differs is where the two come from."""

    def __init__(self, devices: Devices, streams: Streams) -> None:
        self._devices = devices
        self._streams = streams
        self._was_read_only = False
        self._is_prepared = False
        self._is_final = False
        self.old: BlockNode
        self.overlay: OverlayNode

    @abstractmethod
    async def _find(self) -> tuple[BlockNode, OverlayNode]:
        """The image and the overlay for it."""

    async def prepare(self) -> None:
        self.old, self.overlay = await self._find()
        check_acyclic(self.overlay, "backing", self.old)
        self._devices.graph.add_user(self.overlay, _USER)
        self._is_prepared = True
        await self._make_durable(self.overlay)

    async def _make_durable(self, overlay: OverlayNode) -> None:
        """See that a power cut cannot take away the overlay itself, which may be a second old."""
        await overlay.flush()
        for file in files_of(overlay):
            await in_thread(sync_folder, file)

    def _require_replaceable(self, old: BlockNode) -> None:
        """Refuse an image in whose place nothing can be put."""
        self._streams.require_free([old, unfiltered(old)])
        graph = self._devices.graph
        graph.require_no_overlay(old)
        above = [parent for parent, _ in graph.parents(old)]
        for node in (old, *above):
            if isinstance(node, BlkStream):
                raise RequestError(
                    f"There can be no overlay on '{old.node_name}': the filter '{node.node_name}' is in front"
                )
        for parent in above:
            if not isinstance(parent, FilterNode):
                raise RequestError(f"Node '{old.node_name}' is busy: it is the file of '{parent.node_name}'")

    def disks(self) -> list[BlockNode]:
        return [self.old]

    async def perform(self) -> None:
        # Another change of the same transaction may have come first.
        self._require_replaceable(self.old)
        if any(self._devices.graph.parents(self.overlay)) or self.overlay.backing is not None:
            raise RequestError("The overlay is already in use")
        self._was_read_only = self.old.read_only
        self._devices.put_overlay(self.old, self.overlay)
        try:
            await self._devices.graph.nodes.locks.cover()
            await self._devices.graph.set_read_only(self.old, True)
        except BaseException:
            await self.undo()
            raise

    async def undo(self) -> None:
        self._devices.take_overlay(self.old, self.overlay)
        self._devices.graph.connect(self.overlay, "backing", None)
        try:
            await self._devices.graph.set_read_only(self.old, self._was_read_only)
        except BlockdError as error:
            log.error("node %s stays read-only: %s", self.old.node_name, error.message)

    def make_final(self) -> None:
        self._is_final = True

    async def clean(self) -> None:
        if self._is_prepared:
            self._devices.graph.remove_user(self.overlay, _USER)
            await self._devices.graph.close_unused()


class Switch(PutOverlay):
    """block_switch: the overlay is a file that records the active image as its backing file."""

    def __init__(
        self, devices: Devices, streams: Streams, name: str, filename: str, format_name: str | None
    ) -> None:
        super().__init__(devices, streams)
        self._name = name
        self._filename = filename
        self._format_name = format_name or DEFAULT_FORMAT

    async def _find(self) -> tuple[BlockNode, OverlayNode]:
        device = self._devices.get(self._name)
        if self._streams.on(device) is not None:
            raise RequestError(f"Device '{self._name}' is in use", kind=ErrorKind.DEVICE_IN_USE)
        old = device.active
        self._require_replaceable(old)
        return old, await self._devices.graph.open_overlay(self._filename, self._format_name, old)


class SnapshotOnNode(PutOverlay):
    """blockdev-snapshot: the overlay is a node that has no backing yet."""

    def __init__(self, devices: Devices, streams: Streams, node: str, overlay: str) -> None:
        super().__init__(devices, streams)
        self._node = node
        self._overlay = overlay

    async def _find(self) -> tuple[BlockNode, OverlayNode]:
        graph = self._devices.graph
        old = self._devices.find_node(self._node)
        self._require_replaceable(old)
        overlay = self._devices.find_node(self._overlay)
        is_read = CONSISTENT_READ in graph.permissions.uses.wanted(overlay).need
        # A device reads its chain, also while it has no export.
        if is_read or graph.users(overlay) or (graph.users(old) and any(graph.parents(overlay))):
            raise RequestError("The overlay is already in use")
        if isinstance(overlay, FilterNode):
            raise RequestError("Filters cannot be used as overlays")
        if overlay.backing is not None:
            raise RequestError("The overlay already has a backing image")
        if not isinstance(overlay, OverlayNode):
            raise RequestError("The overlay does not support backing images")
        check_acyclic(overlay, "backing", old)
        if any(graph.parents(overlay)):
            raise RequestError("The overlay is already in use")
        if overlay.size < old.size:
            raise RequestError(
                f"The overlay '{overlay.node_name}' has {overlay.size} bytes, fewer than the {old.size} of "
                f"'{old.node_name}'"
            )
        check_chain(overlay, old)
        return old, overlay


class SnapshotInFile(PutOverlay):
    """blockdev-snapshot-sync: the overlay is a file, made for the purpose unless it is there already."""

    def __init__(
        self,
        devices: Devices,
        streams: Streams,
        *,
        device: str | None,
        node_name: str | None,
        filename: str,
        overlay_name: str | None,
        format_name: str,
        is_existing: bool,
    ) -> None:
        super().__init__(devices, streams)
        self._device = device
        self._node_name = node_name
        self._filename = filename
        self._overlay_name = overlay_name
        self._format_name = format_name
        self._is_existing = is_existing
        # The files that were made, the overlay first; they are removed again if nothing comes of it.
        self._made: list[MadeFile] = []

    async def _find(self) -> tuple[BlockNode, OverlayNode]:
        graph = self._devices.graph
        old = self._devices.find(device=self._device, node_name=self._node_name)
        if self._node_name is None:
            old = unfiltered(old)
        self._require_replaceable(old)
        if self._node_name is not None and self._overlay_name is None:
            raise RequestError("New overlay node-name missing")
        if self._overlay_name in graph.nodes:
            raise RequestError("New overlay node-name already in use")
        if not self._is_existing:
            await self._make_file(old)
        overlay = await graph.open_overlay(
            self._filename,
            self._format_name,
            old,
            node_name=self._overlay_name,
            find=self._made[0].find if self._made else None,
        )
        return old, overlay

    @uninterrupted
    async def _make_file(self, old: BlockNode) -> None:
        if self._format_name not in FORMATS:
            raise RequestError(f"Unknown file format '{printable(self._format_name)}'")
        image_format = FORMATS[self._format_name]
        if not image_format.has_backing:
            raise RequestError(f"Backing file not supported for file format '{self._format_name}'")
        path = given_path(self._filename)
        backing = recordable(absolute(old.filename))
        async with new_file(path) as file:
            await image_format.create(
                file,
                old.size,
                backing_filename=backing,
                backing_format=format_of(old),
            )
            self._made = await in_thread(file.made_blocking)

    async def clean(self) -> None:
        await super().clean()
        for file in self._made:
            if not self._is_final:
                await in_thread(file.remove)
            await in_thread(file.close)
