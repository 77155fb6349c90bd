"""The verbs of June 2011: block_stream, block_stream_cancel, block_stream_status, block_switch."""

from collections.abc import Callable

from pydantic import Field

from blockd.aio import in_thread
from blockd.block.node import OverlayNode
from blockd.commands.context import Services
from blockd.commands.events import BlockStreamCompleted, BlockSwitched
from blockd.commands.topic import Table
from blockd.devices.backing_names import find_base
from blockd.devices.changes import make_changes
from blockd.devices.device import Device
from blockd.devices.overlays import Switch
from blockd.devices.stream_request import JobOptions, StreamRequest
from blockd.devices.streams import Stream
from blockd.errors import ErrorKind, RequestError
from blockd.filters.blkstream import BlkStream
from blockd.formats.add_cow.image import AddCowImage
from blockd.jobs.job import IoStatus, Job, OnError
from blockd.jobs.states import JobStatus
from blockd.jobs.stream import StreamJob
from blockd.qmp.models import Arguments, NonNegative, Result

TABLE: Table = Table()


class BlockStreamArguments(Arguments):
    """What to copy into the active image of a device, and how."""

    device: str
    base: str | None = None
    """An image of the backing chain, by file name: nothing is copied from it or from below it."""
    all: bool = True
    """Accepted for the first version of this command; a stream always copies all that is missing."""
    speed: NonNegative = 0
    """Bytes per second; 0 is unlimited."""
    on_error: OnError = Field(OnError.REPORT, strict=False)


@TABLE.command("block_stream")
async def block_stream(services: Services, arguments: BlockStreamArguments) -> None:
    """Copy into a device's active image what its backing files hold, while the guest uses it."""
    device = services.devices.get(arguments.device)
    if services.streams.on(device) is not None:
        raise _in_use(device)
    if device.active.read_only or not isinstance(device.active, OverlayNode):
        raise RequestError(
            f"Device '{device.name}' has no writable active image with a backing file",
            kind=ErrorKind.NOT_SUPPORTED,
        )
    base = await in_thread(find_base, device.node, arguments.base) if arguments.base is not None else None
    options = JobOptions(speed=arguments.speed, on_error=arguments.on_error)
    try:
        await services.streams.start(
            StreamRequest(
                device.node,
                device.name,
                base=base,
                options=options,
                on_done=stream_teller(services, device.name),
            )
        )
    except RequestError as error:
        if services.streams.on(device) is not None:
            raise _in_use(device) from error  # another client was faster
        raise


def stream_teller(services: Services, device: str) -> Callable[[Job], None]:
    """What tells the end of a stream that block_stream started."""

    def tell(job: Job) -> None:
        if not job.is_cancelled:
            services.events.emit(
                BlockStreamCompleted(
                    device=device,
                    len=job.length,
                    offset=job.offset,
                    error=job.error_text,
                    x_detail=job.error_detail,
                    image=job.plain_image,
                    copied=job.counters.copied if isinstance(job, StreamJob) else None,
                )
            )

    return tell


class BlockStreamCancelArguments(Arguments):
    """Which device's stream to end."""

    device: str
    force: bool = False
    """Of a stream that has ended: give up what guests wrote and what cannot be merged into the image. It is
    lost then, and the next flush of each of them fails."""


@TABLE.command("block_stream_cancel", oob=True)
async def block_stream_cancel(services: Services, arguments: BlockStreamCancelArguments) -> None:
    """End a stream as soon as possible; the image keeps its backing file and can be streamed again.

    Guest writes that are staged are not lost by that: they are merged as soon as source and target allow it.
    """
    device = services.devices.get(arguments.device)
    stream = services.streams.on(device)
    if stream is None and services.streams.draining_on(device) is not None:
        _give_up(services, device, is_forced=arguments.force)
        return
    if stream is None:
        raise RequestError(f"No active stream on device '{device.name}'", kind=ErrorKind.DEVICE_NOT_ACTIVE)
    if stream.job.is_cancelled or not stream.job.can_be_cancelled:
        raise _in_use(device)
    stream.job.cancel()


def _give_up(services: Services, device: Device, *, is_forced: bool) -> None:
    if not is_forced:
        staged = services.streams.staged_text(device.active)
        raise RequestError(
            f"The stream on device '{device.name}' has ended, but guest writes are staged until they can be "
            f"merged, and would be lost: {staged}; wait for that, or use 'force' to give them up"
        )
    services.streams.give_up_staged(device.active)


class BlockStreamStatusArguments(Arguments):
    """Which device to tell about; all without one."""

    device: str | None = None


class BlockStreamStatus(Result):
    """A stream, and what it did so far. All counts are bytes.

    A stream that has ended is listed, as concluded, while guest writes are staged that it left to be merged.
    """

    device: str
    type: str
    len: int
    offset: int
    """How far the stream is, skipped ranges included."""
    speed: int
    status: JobStatus
    io_status: IoStatus
    base: str | None = None
    """The final base; nothing is copied from it or from below it."""
    copied: int
    skipped: int
    """Needed no copy: in the image already, in the final base, or nowhere."""
    zero: int
    """Found to be zeroes and recorded as such."""
    guest_written: int
    """Written by the guest since the stream began."""
    rate: int
    """Bytes copied per second."""
    leeway: int
    """Copied at once, at most: less while guests wait for the disk."""
    staged: int
    """Written by the guest to parts of clusters whose other parts the source has not delivered: it is in
    memory, and merged into the image before a flush is acknowledged."""
    staged_error: str | None = None
    """Why some of that could not be merged when it was tried last; it is tried again."""
    seconds_left: float | None = None
    """An estimate; absent while there is nothing to estimate from."""
    image: str | None = None
    """Of an add-cow image: the plain image that the data is in."""
    all_allocated: bool | None = None
    """Whether that holds everything, so that add-cow file and backing files are not needed any more."""


@TABLE.command("query-block-stream", oob=True)
@TABLE.command("block_stream_status", oob=True)
async def block_stream_status(
    services: Services, arguments: BlockStreamStatusArguments
) -> list[BlockStreamStatus]:
    """Tell how far the streams are."""
    if arguments.device is not None:
        devices = [services.devices.get(arguments.device)]
    else:
        devices = list(services.devices)
    found = []
    for device in devices:
        stream, draining = services.streams.on(device), services.streams.draining_on(device)
        if stream is not None:
            found.append(_status(device, stream))
        elif draining is not None:
            found.append(_draining_status(device, draining.front))
    return found


def _staged(front: BlkStream) -> dict[str, object]:
    error = front.staging_error
    return {"staged": front.staged_length, "staged_error": error.message if error is not None else None}


def _draining_status(device: Device, front: BlkStream) -> BlockStreamStatus:
    """Of a stream whose job is over nothing is known any more but what it has left."""
    error = front.staging_error
    is_full = error is not None and error.kind is ErrorKind.NO_SPACE
    status = IoStatus.OK if error is None else IoStatus.NOSPACE if is_full else IoStatus.FAILED
    nothing = dict.fromkeys(("offset", "speed", "copied", "skipped", "zero", "rate", "leeway"), 0)
    return BlockStreamStatus.model_validate(
        {
            **nothing,
            **_staged(front),
            "device": device.name,
            "type": StreamJob.type,
            "len": front.size,
            "status": JobStatus.CONCLUDED,
            "io_status": status,
            "guest_written": front.guest_written,
        }
    )


def _status(device: Device, stream: Stream) -> BlockStreamStatus:
    job, base, active = stream.job, stream.front.base, stream.front.active
    return BlockStreamStatus(
        device=device.name,
        type=job.type,
        len=job.length,
        offset=job.offset,
        speed=job.speed,
        status=job.status,
        io_status=job.io_status,
        base=base.filename if base is not None else None,
        copied=job.counters.copied,
        skipped=job.counters.skipped,
        zero=job.counters.zero,
        guest_written=job.guest_written,
        rate=int(job.rate),
        leeway=job.leeway.length,
        staged=stream.front.staged_length,
        staged_error=stream.front.staging_error.message if stream.front.staging_error else None,
        seconds_left=job.seconds_left,
        image=active.image.filename if isinstance(active, AddCowImage) else None,
        all_allocated=active.is_complete if isinstance(active, AddCowImage) else None,
    )


class LostWritesInfo(Result):
    """A disk that has lost what guests wrote."""

    device: str
    """The name of the device; empty if the node is exported without one, or not used at all."""
    node_name: str
    error: str
    """Why. The next flush of every client that may write fails with it."""


@TABLE.command("query-lost-writes")
async def query_lost_writes(services: Services) -> list[LostWritesInfo]:
    """List the disks that have lost acknowledged writes, until somebody acknowledges that."""
    devices = services.devices
    return [
        LostWritesInfo(device=devices.name_of(node), node_name=node.node_name, error=why)
        for node, why in devices.losses
    ]


class AcknowledgeLostWritesArguments(Arguments):
    """A device or a node; one of them is given."""

    device: str | None = None
    node_name: str | None = None


@TABLE.command("acknowledge-lost-writes")
async def acknowledge_lost_writes(services: Services, arguments: AcknowledgeLostWritesArguments) -> None:
    """Forget that a disk has lost acknowledged writes: flushes do not fail any more because of that."""
    async with services.devices.change():
        node = services.devices.find(device=arguments.device, node_name=arguments.node_name)
        services.devices.acknowledge_loss(node)


class BlockSwitchArguments(Arguments):
    """The new active image: an overlay of the active image of now."""

    device: str
    filename: str
    format: str | None = None
    """The format of the new image, qcow2 without it; never guessed from its content."""


@TABLE.command("block_switch")
async def block_switch(services: Services, arguments: BlockSwitchArguments) -> None:
    """Put an overlay of a device's active image in its place, in one step for the guest."""
    change = Switch(
        services.devices, services.streams, arguments.device, arguments.filename, arguments.format
    )
    await make_changes(services.devices, [change])
    services.events.emit(
        BlockSwitched(device=arguments.device, filename=change.overlay.filename, backing=change.old.filename)
    )


def _in_use(device: Device) -> RequestError:
    return RequestError(f"Device '{device.name}' is in use", kind=ErrorKind.DEVICE_IN_USE)
