"""Nodes and devices: adding, removing, listing, resizing."""

from functools import partial

from pydantic import ConfigDict

from blockd.aio import in_turns
from blockd.block.chain import unfiltered
from blockd.block.permissions import RESIZE
from blockd.commands.context import Services
from blockd.commands.field_schemas import node_schema
from blockd.commands.left_out import give_up
from blockd.commands.node_info import BlockDeviceInfo, device_info, usages
from blockd.commands.topic import Table
from blockd.devices.changes import make_changes
from blockd.devices.device import Device
from blockd.devices.left_out import Kind
from blockd.devices.reopening import Reopen, Together
from blockd.drivers import check_blockdev
from blockd.drivers.permissions import Claim
from blockd.errors import ErrorKind, RequestError
from blockd.jobs.job import IoStatus
from blockd.qmp.models import Arguments, Int64, Result
from blockd.units import SECTOR_SIZE

TABLE: Table = Table()


class BlockdevAddArguments(Arguments):
    """A node and the nodes below it; which members there are depends on the driver."""

    model_config = ConfigDict(extra="allow", json_schema_extra=node_schema)

    driver: str
    node_name: str | None = None


@TABLE.command("blockdev-add")
async def blockdev_add(services: Services, arguments: BlockdevAddArguments) -> None:
    """Open a node."""
    async with services.devices.change():
        await services.graph.open(arguments.model_dump(by_alias=True, exclude_unset=True))


class BlockdevReopenArguments(Arguments):
    """Nodes, each with all its options as they are to be."""

    options: list[BlockdevAddArguments]


@TABLE.command("blockdev-reopen")
async def blockdev_reopen(services: Services, arguments: BlockdevReopenArguments) -> None:
    """Change the options of nodes, of all of them or none."""
    told = [options.model_dump(by_alias=True, exclude_unset=True) for options in arguments.options]
    checked = [
        check_blockdev(options, is_text=False, path=f"options[{number}]")
        for number, options in enumerate(told)
    ]
    together = Together()
    changes = [Reopen(services.devices, services.streams, options, together) for options in checked]
    await make_changes(services.devices, changes)


class BlockdevDelArguments(Arguments):
    """Which node."""

    node_name: str


@TABLE.command("blockdev-del")
async def blockdev_del(services: Services, arguments: BlockdevDelArguments) -> None:
    """Close a node that blockdev-add opened."""
    async with services.devices.change():
        if give_up(services, Kind.NODE, arguments.node_name):
            return
        node = services.graph[arguments.node_name]
        if services.streams.is_filter_of_job(node):
            raise RequestError(f"Node {node.node_name} is in use")
        services.streams.require_free([node])
        await services.graph.remove(arguments.node_name)


class QueryNamedBlockNodesArguments(Arguments):
    """How much to tell."""

    flat: bool = False
    """Leave out the images below each node."""


@TABLE.command("query-named-block-nodes")
async def query_named_block_nodes(
    services: Services, arguments: QueryNamedBlockNodesArguments
) -> list[BlockDeviceInfo]:
    """List all nodes, the newest first."""
    nodes = list(services.graph.nodes.values())
    used = await usages(nodes)
    return await in_turns(partial(device_info, used=used, flat=arguments.flat), reversed(nodes))


class BlockInfo(Result):
    """A device."""

    device: str
    type: str = "unknown"
    removable: bool = False
    locked: bool = False
    io_status: IoStatus
    inserted: BlockDeviceInfo


@TABLE.command("query-block")
async def query_block(services: Services) -> list[BlockInfo]:
    """List the devices, each with its active image and the images below that."""
    used = await usages([device.node for device in services.devices])

    def info_of(device: Device) -> BlockInfo:
        stream = services.streams.on(device)
        io_status = stream.job.io_status if stream is not None else IoStatus.OK
        return BlockInfo(device=device.name, io_status=io_status, inserted=device_info(device.node, used))

    return await in_turns(info_of, services.devices)


class BlockResizeArguments(Arguments):
    """Which disk, and its new size."""

    device: str | None = None
    node_name: str | None = None
    size: Int64
    """Bytes, a multiple of 512."""


@TABLE.command("block_resize")
async def block_resize(services: Services, arguments: BlockResizeArguments) -> None:
    """Change the size of a disk; new bytes read as zeroes."""
    async with services.devices.change():
        node = services.devices.find(device=arguments.device, node_name=arguments.node_name)
        if arguments.size < 0:
            raise RequestError("Parameter 'size' expects a >0 size")
        if arguments.size % SECTOR_SIZE:
            raise RequestError(f"The new size must be a multiple of {SECTOR_SIZE}")
        services.streams.require_free([node, unfiltered(node)])
        services.graph.require_no_overlay(unfiltered(node))
        planned = services.graph.permissions.require(Claim(node, RESIZE))
        if node.read_only:
            raise RequestError("Image is read-only", kind=ErrorKind.READ_ONLY)
        await services.graph.nodes.locks.take(planned)
        async with services.devices.drained(node, is_bounded=True):
            try:
                await node.resize(arguments.size)
            finally:
                services.graph.nodes.refresh_filters(unfiltered(node))
