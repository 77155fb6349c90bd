"""Snapshots: overlays for disks in use, one or several at once, and what images record as their backing."""

from typing import Literal

from blockd.block.chain import chain, unfiltered
from blockd.block.node import OverlayNode
from blockd.commands.context import Services
from blockd.commands.topic import Table
from blockd.devices.changes import make_changes
from blockd.devices.overlays import DEFAULT_FORMAT, SnapshotInFile, SnapshotOnNode
from blockd.errors import BlockdError, RequestError, printable
from blockd.filenames import recordable
from blockd.qmp.models import Arguments

TABLE: Table = Table()

NewImageMode = Literal["existing", "absolute-paths"]


class BlockdevSnapshotArguments(Arguments):
    """Which node gets which overlay."""

    node: str
    """A device or node."""
    overlay: str
    """A node that has no backing."""


def snapshot_on_node(services: Services, arguments: BlockdevSnapshotArguments) -> SnapshotOnNode:
    return SnapshotOnNode(services.devices, services.streams, arguments.node, arguments.overlay)


@TABLE.command("blockdev-snapshot")
async def blockdev_snapshot(services: Services, arguments: BlockdevSnapshotArguments) -> None:
    """Put an overlay in the place of a node, which becomes its backing and read-only."""
    await make_changes(services.devices, [snapshot_on_node(services, arguments)])


class BlockdevSnapshotSyncArguments(Arguments):
    """Which device or node gets an overlay, and in which file that is."""

    device: str | None = None
    node_name: str | None = None
    snapshot_file: str
    snapshot_node_name: str | None = None
    format: str = DEFAULT_FORMAT
    mode: NewImageMode = "absolute-paths"
    """``existing``: the file is an overlay of the node already; otherwise it is made."""


def snapshot_in_file(services: Services, arguments: BlockdevSnapshotSyncArguments) -> SnapshotInFile:
    return SnapshotInFile(
        services.devices,
        services.streams,
        device=arguments.device,
        node_name=arguments.node_name,
        filename=arguments.snapshot_file,
        overlay_name=arguments.snapshot_node_name,
        format_name=arguments.format,
        is_existing=arguments.mode == "existing",
    )


@TABLE.command("blockdev-snapshot-sync")
async def blockdev_snapshot_sync(services: Services, arguments: BlockdevSnapshotSyncArguments) -> None:
    """Put an overlay in a file, made for the purpose, in the place of an image, which becomes read-only."""
    await make_changes(services.devices, [snapshot_in_file(services, arguments)])


class ChangeBackingFileArguments(Arguments):
    """Which image is to record which backing file."""

    device: str
    """A device or node that has the image in its chain."""
    image_node_name: str
    backing_file: str
    """The name as it is recorded; empty: none."""


@TABLE.command("change-backing-file")
async def change_backing_file(services: Services, arguments: ChangeBackingFileArguments) -> None:
    """Change what an image records as its backing file; what it has as its backing now stays."""
    async with services.devices.change():
        top = services.devices.find_node(arguments.device)
        if any(services.graph.parents(top)):
            raise RequestError("Need a root block node")
        image = services.devices.find(node_name=arguments.image_node_name)
        if not isinstance(image, OverlayNode) or image.backing is None:
            raise RequestError("not allowing backing file change on an image without a backing file")
        services.streams.require_free([unfiltered(top), image])
        if image not in chain(top):
            raise RequestError(f"'{arguments.device}' and image file are not in the same chain")
        services.graph.require_liftable(image)
        try:
            name = recordable(arguments.backing_file) if arguments.backing_file else None
            await services.devices.change_backing(image, name)
        except BlockdError as error:
            raise RequestError(
                f"Could not change backing file to '{printable(arguments.backing_file)}': {error.message}"
            ) from error
