"""What the daemon does, as one JSON document; the page, the metrics and monitoring tools read it.

File names, counters and error texts are in it; guest data and credentials are not.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from blockd import __version__
from blockd.aio import in_turns
from blockd.block.accounting import Counter, DiskStats
from blockd.block.chain import chain, format_of
from blockd.block.node import BlockNode
from blockd.devices.device import Device, Devices
from blockd.devices.exports import Exports
from blockd.devices.streams import Stream, Streams
from blockd.errors import printable
from blockd.jobs.job import IoStatus, Job
from blockd.jobs.manager import JobManager
from blockd.jobs.states import JobStatus
from blockd.qmp.models import Result


class Sources(NamedTuple):
    """The parts of the daemon that are shown."""

    devices: Devices
    streams: Streams
    jobs: JobManager
    exports: Exports
    started: float
    """By `time.monotonic`."""


class Layer(Result):
    """An image of a backing chain."""

    node_name: str
    filename: str
    format: str
    size: int
    read_only: bool


class Operations(Result):
    """What guests asked for of one kind since the daemon runs; failed requests are not among `count`."""

    count: int
    byte_count: int
    seconds: float
    failed: int


class GuestActivity(Result):
    """What guests did to a disk."""

    read: Operations
    write: Operations
    discard: Operations
    flush: Operations


class StreamStatus(Result):
    """A stream into the active image of a disk; all counts are bytes."""

    job: str
    status: JobStatus
    io_status: IoStatus
    length: int
    offset: int
    """How far it is, skipped ranges included."""
    speed: int
    """The limit in bytes per second; 0: none."""
    rate: int
    """Bytes copied per second."""
    leeway: int
    """Copied at once, at most: less while guests wait for the disk."""
    seconds_left: float | None = None
    copied: int
    skipped: int
    zero: int
    guest_written: int
    base: str | None = None


class DeviceStatus(Result):
    """A disk; without a name if only exports use it."""

    name: str
    node_name: str
    chain: list[Layer]
    """The active image first."""
    exports: list[str]
    guest: GuestActivity
    stream: StreamStatus | None = None


class JobStatusEntry(Result):
    """A job that is not dismissed."""

    id: str
    type: str
    status: JobStatus
    offset: int
    length: int
    error: str | None = None


class NbdStatus(Result):
    """The NBD server."""

    addresses: list[str]
    connections: int


class Status(Result):
    """All of it."""

    version: str
    uptime_seconds: float
    devices: list[DeviceStatus]
    jobs: list[JobStatusEntry]
    nbd: NbdStatus | None = None


async def status_of(sources: Sources) -> Status:
    """Look at the daemon, one disk after the other; nothing waits for that."""
    server = sources.exports.server
    return Status(
        version=__version__,
        uptime_seconds=round(time.monotonic() - sources.started, 3),
        devices=await in_turns(partial(_device, sources), sources.devices.all),
        jobs=[_job(job) for job in reversed(list(sources.jobs))],
        nbd=None
        if server is None
        else NbdStatus(
            addresses=[printable(address) for address in server.addresses],
            connections=server.connection_count,
        ),
    )


async def json_of(status: Status) -> bytes:
    """Write the status, one disk after the other."""
    devices = await in_turns(DeviceStatus.model_dump_json, status.devices)
    rest = status.model_dump_json(exclude={"devices"}).removesuffix("}")
    return f'{rest},"devices":[{",".join(devices)}]}}'.encode()


def _device(sources: Sources, device: Device) -> DeviceStatus:
    stream = sources.streams.on(device)
    return DeviceStatus(
        name=device.name,
        node_name=device.node.node_name,
        chain=list(_layers(device.node)),
        exports=sorted(device.exports),
        guest=_guest(device.root.stats),
        stream=_stream(stream) if stream is not None else None,
    )


def _layers(top: BlockNode) -> Iterator[Layer]:
    for node in chain(top):
        yield Layer(
            node_name=node.node_name,
            filename=printable(node.filename),
            format=format_of(node),
            size=node.size,
            read_only=node.read_only,
        )


def _guest(stats: DiskStats) -> GuestActivity:
    return GuestActivity(
        read=_operations(stats.read),
        write=_operations(stats.write),
        discard=_operations(stats.unmap),
        flush=_operations(stats.flush),
    )


def _operations(counter: Counter) -> Operations:
    return Operations(
        count=counter.operations,
        byte_count=counter.byte_count,
        seconds=counter.time_ns / 1e9,
        failed=counter.failed,
    )


def _stream(stream: Stream) -> StreamStatus:
    job, base = stream.job, stream.front.base
    return StreamStatus(
        job=job.id,
        status=job.status,
        io_status=job.io_status,
        length=job.length,
        offset=job.offset,
        speed=job.speed,
        rate=int(job.rate),
        leeway=job.leeway.length,
        seconds_left=job.seconds_left,
        copied=job.counters.copied,
        skipped=job.counters.skipped,
        zero=job.counters.zero,
        guest_written=job.guest_written,
        base=printable(base.filename) if base is not None else None,
    )


def _job(job: Job) -> JobStatusEntry:
    return JobStatusEntry(
        id=job.id,
        type=job.type,
        status=job.status,
        offset=job.offset,
        length=job.length,
        error=printable(job.error.message) if job.error is not None else None,
    )
