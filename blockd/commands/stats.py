"""query-blockstats: what guests did to disks and nodes."""

import time
from functools import partial

from pydantic import ConfigDict, Field

from blockd.aio import in_turns
from blockd.block.accounting import DiskStats
from blockd.block.chain import primary_child
from blockd.block.node import BlockNode
from blockd.commands.context import Services
from blockd.commands.topic import Table
from blockd.devices.device import Device
from blockd.qmp.models import Arguments, Members, Result

TABLE: Table = Table()


class BlockDeviceTimedStats(Members):
    """Counters of an interval."""


class BlockDeviceStats(Members):
    """Counters since the disk is there; all times are nanoseconds.

    Failed and invalid requests are not among the operations.
    """

    model_config = ConfigDict(alias_generator=lambda name: name)

    rd_bytes: int
    wr_bytes: int
    unmap_bytes: int
    rd_operations: int
    wr_operations: int
    unmap_operations: int
    flush_operations: int
    rd_total_time_ns: int
    wr_total_time_ns: int
    unmap_total_time_ns: int
    flush_total_time_ns: int
    wr_highest_offset: int
    rd_merged: int = 0
    wr_merged: int = 0
    unmap_merged: int = 0
    idle_time_ns: int | None = None
    """Since the last request; absent when there was none."""
    failed_rd_operations: int
    failed_wr_operations: int
    failed_unmap_operations: int
    failed_flush_operations: int
    invalid_rd_operations: int
    invalid_wr_operations: int
    invalid_unmap_operations: int
    invalid_flush_operations: int
    account_invalid: bool = False
    account_failed: bool = False
    timed_stats: list[BlockDeviceTimedStats] = Field(default_factory=list)
    """Always empty."""


class BlockStats(Result):
    """What guests did to a device or node."""

    device: str | None = None
    node_name: str
    stats: BlockDeviceStats
    parent: "BlockStats | None" = None
    """The node that holds the bytes."""
    backing: "BlockStats | None" = None


class QueryBlockstatsArguments(Arguments):
    """What to tell about."""

    query_nodes: bool = False
    """Nodes instead of devices."""


@TABLE.command("query-blockstats")
async def query_blockstats(services: Services, arguments: QueryBlockstatsArguments) -> list[BlockStats]:
    """Tell what guests did to devices, with the nodes below them, or to nodes.

    A node that guests use has the counters of its disk.
    """
    disks = {device.node: device.root.stats for device in services.devices.all}
    if arguments.query_nodes:
        nodes = list(services.graph.nodes.values())
        return await in_turns(partial(_stats_of, disks=disks, with_backing=False), nodes)

    def stats_of(device: Device) -> BlockStats:
        return _stats_of(device.node, disks, with_backing=True).model_copy(update={"device": device.name})

    return await in_turns(stats_of, services.devices)


def _stats_of(node: BlockNode, disks: dict[BlockNode, DiskStats], *, with_backing: bool) -> BlockStats:
    below = primary_child(node)
    backing = node.backing if with_backing else None
    return BlockStats(
        node_name=node.node_name,
        stats=_counters(disks.get(node) or DiskStats()),
        parent=_stats_of(below, disks, with_backing=with_backing) if below is not None else None,
        backing=_stats_of(backing, disks, with_backing=True) if backing is not None else None,
    )


def _counters(stats: DiskStats) -> BlockDeviceStats:
    counted = {"rd": stats.read, "wr": stats.write, "unmap": stats.unmap, "flush": stats.flush}
    values: dict[str, int] = {}
    for name, counter in counted.items():
        values |= {
            f"{name}_operations": counter.operations,
            f"{name}_total_time_ns": counter.time_ns,
            f"failed_{name}_operations": counter.failed,
            f"invalid_{name}_operations": counter.invalid,
        }
        if name != "flush":
            values[f"{name}_bytes"] = counter.byte_count
    if stats.last_ns:
        values["idle_time_ns"] = time.monotonic_ns() - stats.last_ns
    return BlockDeviceStats.model_validate({**values, "wr_highest_offset": stats.highest_write})
