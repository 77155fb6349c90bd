"""Nodes and devices: adding, removing, listing, resizing."""

from pydantic import ConfigDict

from blockd.aio import in_thread
from blockd.block.chain import unfiltered
from blockd.commands.context import Services
from blockd.commands.node_info import BlockDeviceInfo, device_info
from blockd.commands.topic import Table
from blockd.devices.changes import make_changes
from blockd.devices.reopening import Reopen
from blockd.drivers import check_blockdev
from blockd.errors import ErrorKind, RequestError
from blockd.jobs.job import IoStatus
from blockd.qmp.models import Arguments, Int64, Result
from blockd.units import SECTOR_SIZE

TABLE: Table = Table()


class BlockdevAddArguments(Arguments):
    """A node and the nodes below it; which members there are depends on the driver."""

    model_config = ConfigDict(extra="allow")

    driver: str
    node_name: str | None = None


@TABLE.command("blockdev-add")
async def blockdev_add(services: Services, arguments: BlockdevAddArguments) -> None:
    """Open a node."""
    async with services.devices.changing:
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
    changes = [Reopen(services.devices, services.streams, options) for options in checked]
    await make_changes(services.devices, changes)


class BlockdevDelArguments(Arguments):
    """Which node."""

    node_name: str


@TABLE.command("blockdev-del")
async def blockdev_del(services: Services, arguments: BlockdevDelArguments) -> None:
    """Close a node that blockdev-add opened."""
    async with services.devices.changing:
        services.streams.require_free([services.graph[arguments.node_name]])
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
    return await in_thread(lambda: [device_info(node, flat=arguments.flat) for node in reversed(nodes)])


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
    found: list[BlockInfo] = []
    for device in services.devices:
        stream = services.streams.on(device)
        info = await in_thread(device_info, device.node)
        io_status = stream.job.io_status if stream is not None else IoStatus.OK
        found.append(BlockInfo(device=device.name, io_status=io_status, inserted=info))
    return found


class BlockResizeArguments(Arguments):
    """Which disk, and its new size."""

    device: str | None = None
    node_name: str | None = None
    size: Int64
    """Bytes, a multiple of 512."""


@TABLE.command("block_resize")
async def block_resize(services: Services, arguments: BlockResizeArguments) -> None:
    """Change the size of a disk; new bytes read as zeroes."""
    node = services.devices.find(device=arguments.device, node_name=arguments.node_name)
    if arguments.size < 0:
        raise RequestError("Parameter 'size' expects a >0 size")
    if arguments.size % SECTOR_SIZE:
        raise RequestError(f"The new size must be a multiple of {SECTOR_SIZE}")
    async with services.devices.changing:
        services.streams.require_free([unfiltered(node)])
        services.graph.require_no_overlay(unfiltered(node))
        if node.read_only:
            raise RequestError("Image is read-only", kind=ErrorKind.READ_ONLY)
        async with services.devices.drained(node):
            await node.resize(arguments.size)
            services.graph.refresh_filters(unfiltered(node))
