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
from blockd.devices.streams import JobOptions, Stream, StreamRequest
from blockd.errors import ErrorKind, RequestError
from blockd.formats.add_cow.image import AddCowImage
from blockd.jobs.job import IoStatus, Job, OnError
from blockd.jobs.states import JobStatus
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
            error = job.error.message if job.error else None
            services.events.emit(
                BlockStreamCompleted(
                    device=device, len=job.length, offset=job.offset, error=error, image=job.plain_image
                )
            )

    return tell


class BlockStreamCancelArguments(Arguments):
    """Which device's stream to end."""

    device: str


@TABLE.command("block_stream_cancel", oob=True)
async def block_stream_cancel(services: Services, arguments: BlockStreamCancelArguments) -> None:
    """End a stream as soon as possible; the image keeps its backing file and can be streamed again."""
    device = services.devices.get(arguments.device)
    stream = services.streams.on(device)
    if stream is None:
        raise RequestError(f"No active stream on device '{device.name}'", kind=ErrorKind.DEVICE_NOT_ACTIVE)
    if stream.job.is_cancelled or not stream.job.can_be_cancelled:
        raise _in_use(device)
    stream.job.cancel()


class BlockStreamStatusArguments(Arguments):
    """Which device to tell about; all without one."""

    device: str | None = None


class BlockStreamStatus(Result):
    """A stream, and what it did so far. All counts are bytes."""

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
    found = ((device, services.streams.on(device)) for device in devices)
    return [_status(device, stream) for device, stream in found if stream is not None]


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
        seconds_left=job.seconds_left,
        image=active.image.filename if isinstance(active, AddCowImage) else None,
        all_allocated=active.is_complete if isinstance(active, AddCowImage) else None,
    )


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
