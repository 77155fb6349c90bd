"""Overlays: another active image for a disk, in one step for its guests.

The image that was active becomes the backing of the new one, and read-only.
"""

import logging
import os
from abc import abstractmethod
from pathlib import Path

from blockd.aio import in_thread
from blockd.block.chain import format_of, unfiltered
from blockd.block.image_paths import without_protocol
from blockd.block.node import BlockNode, FilterNode, OverlayNode
from blockd.devices.changes import Change
from blockd.devices.device import Devices
from blockd.devices.streams import Streams
from blockd.drivers import FORMATS
from blockd.drivers.sharing import check_chain, files_of
from blockd.errors import BlockdError, ErrorKind, RequestError, printable
from blockd.filters.blkstream import BlkStream
from blockd.protocols.new_file import new_file, sync_folder

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
        self._devices.graph.add_user(self.overlay, _USER)
        # From here on nobody else can put another overlay there.
        self.overlay.backing = self.old
        self._is_prepared = True
        await self._make_durable(self.overlay)

    async def _make_durable(self, overlay: OverlayNode) -> None:
        """See that a power cut cannot take away the overlay itself, which may be a second old."""
        await overlay.flush()
        for file in files_of(overlay):
            await in_thread(sync_folder, file.filename)

    def _require_replaceable(self, old: BlockNode) -> None:
        """Refuse an image in whose place nothing can be put."""
        self._streams.require_free([unfiltered(old)])
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
        self._was_read_only = self.old.read_only
        if self.overlay.read_only and self._devices.has_writers(self.old):
            raise RequestError("Block node is read-only", kind=ErrorKind.READ_ONLY)
        await self._devices.graph.set_read_only(self.old, True)
        self._devices.put_overlay(self.old, self.overlay)

    async def undo(self) -> None:
        self._devices.take_overlay(self.old, self.overlay)
        try:
            await self._devices.graph.set_read_only(self.old, self._was_read_only)
        except BlockdError as error:
            log.error("node %s stays read-only: %s", self.old.node_name, error.message)

    def make_final(self) -> None:
        self._is_final = True

    async def clean(self) -> None:
        if self._is_prepared:
            if not self._is_final:
                self.overlay.backing = None
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
        if graph.users(overlay) or any(graph.parents(overlay)):
            raise RequestError("The overlay is already in use")
        if isinstance(overlay, FilterNode):
            raise RequestError("Filters cannot be used as overlays")
        if overlay.backing is not None:
            raise RequestError("The overlay already has a backing image")
        if not isinstance(overlay, OverlayNode):
            raise RequestError("The overlay does not support backing images")
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
        # The files that were made; they are removed again if nothing comes of it.
        self._made: list[str] = []

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
            self._filename, self._format_name, old, node_name=self._overlay_name
        )
        return old, overlay

    async def _make_file(self, old: BlockNode) -> None:
        if self._format_name not in FORMATS:
            raise RequestError(f"Unknown file format '{printable(self._format_name)}'")
        image_format = FORMATS[self._format_name]
        if not image_format.has_backing:
            raise RequestError(f"Backing file not supported for file format '{self._format_name}'")
        path = without_protocol(self._filename)
        async with new_file(path) as file:
            made_files = await in_thread(image_format.made_files, path, {})
            await image_format.create(
                file,
                old.size,
                backing_filename=str(Path(old.filename).absolute()),
                backing_format=format_of(old),
            )
        self._made = made_files

    async def clean(self) -> None:
        await super().clean()
        for path in [] if self._is_final else self._made:
            await in_thread(os.unlink, path)
