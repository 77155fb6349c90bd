"""Jobs: block-stream, and what may be asked of any job, in QEMU's two families of commands.

`block-job-*` finds jobs by ``device`` and `job-*` by ``id``; both mean the job's id.
"""

from pydantic import Field

from blockd.aio import in_thread
from blockd.block.chain import chain_with_filters
from blockd.block.node import BlockNode, FilterNode
from blockd.commands.context import Services
from blockd.commands.left_out import give_up
from blockd.commands.topic import Table
from blockd.devices.backing_names import find_base
from blockd.devices.left_out import Kind
from blockd.devices.stream_request import JobOptions, StreamRequest
from blockd.errors import ErrorKind, RequestError
from blockd.filenames import recordable
from blockd.jobs.job import IoStatus, Job, OnError
from blockd.jobs.states import JobStatus, JobType
from blockd.qmp.models import Arguments, Int64, NonNegative, Result

TABLE: Table = Table()


# -- block-stream ------------------------------------------------------------------------------


class BlockStreamJobArguments(Arguments):
    """What to copy into which node, and how."""

    job_id: str | None = None
    """The name of the device without it; a bare node has none, so there it has to be given."""
    device: str
    """A device or node."""
    base: str | None = None
    """An image of the backing chain, by file name: nothing is copied from it or from below it."""
    base_node: str | None = None
    """The same, by node name."""
    bottom: str | None = None
    """The lowest node that is copied from."""
    backing_file: str | None = None
    """What to record as the backing file at the end; empty: none."""
    backing_mask_protocol: bool = False
    """Accepted: the recorded format is never that of a protocol."""
    speed: NonNegative = 0
    """Bytes per second; 0 is unlimited."""
    on_error: OnError = Field(OnError.REPORT, strict=False)
    filter_node_name: str | None = None
    """The name of the node that is in front of the image meanwhile."""
    auto_finalize: bool = True
    auto_dismiss: bool = True


@TABLE.command("block-stream")
async def block_stream_job(services: Services, arguments: BlockStreamJobArguments) -> None:
    """Copy into a node what its backing files hold, as a job."""
    await services.streams.start(await stream_request(services, arguments))


async def stream_request(services: Services, arguments: BlockStreamJobArguments) -> StreamRequest:
    """Find what is meant.

    Raises:   RequestError: there is no such node, or it is not where it should be.
    """
    _require_one_end(arguments)
    top = services.devices.find_node(arguments.device)
    base = await _base(services, top, arguments)
    services.streams.require_free_path(top, base)
    # With `bottom` QEMU does not look whether there is something below it.
    if (base is None or arguments.bottom is not None) and arguments.backing_file is not None:
        raise RequestError("backing file specified, but streaming the entire chain")
    names = [device.name for device in services.devices.at(top) if device.name]
    return StreamRequest(
        top,
        arguments.job_id if arguments.job_id is not None else "".join(names),
        base=base,
        backing_file=recordable(arguments.backing_file) if arguments.backing_file else arguments.backing_file,
        filter_node_name=arguments.filter_node_name,
        options=JobOptions(
            arguments.speed, arguments.on_error, arguments.auto_finalize, arguments.auto_dismiss
        ),
    )


def _require_one_end(arguments: BlockStreamJobArguments) -> None:
    ends = {"base": arguments.base, "bottom": arguments.bottom, "base-node": arguments.base_node}
    given = [name for name, value in ends.items() if value is not None]
    if given == ["base", "base-node"] or len(given) == 3:
        raise RequestError("'base' and 'base-node' cannot be specified at the same time")
    if len(given) == 2:
        raise RequestError(f"'{given[0]}' and '{given[1]}' cannot be specified at the same time")


async def _base(services: Services, top: BlockNode, arguments: BlockStreamJobArguments) -> BlockNode | None:
    if arguments.base is not None:
        return await in_thread(find_base, top, arguments.base)
    if arguments.base_node is not None:
        node = _node_below(services, arguments.base_node)
        if node not in list(chain_with_filters(top))[1:]:
            raise RequestError(f"Node '{arguments.base_node}' is not a backing image of '{arguments.device}'")
        return node
    if arguments.bottom is not None:
        node = _node_below(services, arguments.bottom)
        if isinstance(node, FilterNode):
            raise RequestError(f"Node '{arguments.bottom}' is a filter, use a non-filter node as 'bottom'")
        if node not in chain_with_filters(top):
            raise RequestError(
                f"Node '{arguments.bottom}' is not in a chain starting from '{arguments.device}'"
            )
        return node.backing
    return None


def _node_below(services: Services, name: str) -> BlockNode:
    if name not in services.graph.nodes:
        raise RequestError(f"Cannot find device='' nor node-name='{name}'")
    return services.graph[name]


# -- queries -----------------------------------------------------------------------------------


class BlockJobInfo(Result):
    """A job as query-block-jobs shows it."""

    auto_finalize: bool
    io_status: IoStatus
    device: str
    """The job's id."""
    auto_dismiss: bool
    busy: bool
    len: int
    offset: int
    status: JobStatus
    paused: bool
    speed: int
    ready: bool
    type: str
    error: str | None = None
    x_detail: str | None = None
    """What else is known of the error: which image, what was done to it."""


@TABLE.command("query-block-jobs")
async def query_block_jobs(services: Services) -> list[BlockJobInfo]:
    """List the jobs that are not dismissed, the newest first."""
    return [
        BlockJobInfo(
            auto_finalize=job.auto_finalize,
            io_status=job.io_status,
            device=job.id,
            auto_dismiss=job.auto_dismiss,
            busy=job.busy,
            len=job.length,
            offset=job.offset,
            status=job.status,
            paused=job.is_user_paused,
            speed=job.speed,
            ready=job.status in (JobStatus.READY, JobStatus.STANDBY),
            type=job.type,
            error=job.error_text,
            x_detail=job.error_detail,
        )
        for job in services.jobs
        if job.is_block_job
    ]


class JobInfo(Result):
    """A job as query-jobs shows it."""

    current_progress: int
    status: JobStatus
    total_progress: int
    type: JobType
    id: str
    error: str | None = None
    x_detail: str | None = None
    """What else is known of the error: which image, what was done to it."""


@TABLE.command("query-jobs", oob=True)
async def query_jobs(services: Services) -> list[JobInfo]:
    """List the jobs that are not dismissed, the newest first."""
    return [
        JobInfo(
            current_progress=job.offset,
            status=job.status,
            total_progress=job.length,
            type=job.type,
            id=job.id,
            error=job.error_text,
            x_detail=job.error_detail,
        )
        for job in services.jobs
    ]


# -- the verbs ---------------------------------------------------------------------------------


class BlockJobArguments(Arguments):
    """Which job."""

    device: str
    """The job's id."""


class BlockJobSetSpeedArguments(BlockJobArguments):
    """Which job, and how fast."""

    speed: Int64
    """Bytes per second; 0 is unlimited."""


class BlockJobCancelArguments(BlockJobArguments):
    """Which job, and whether also when it is paused."""

    force: bool = False


class JobArguments(Arguments):
    """Which job."""

    id: str


def _block_job(services: Services, job_id: str) -> Job:
    job = services.jobs.get(job_id)
    if job is None or not job.is_block_job:
        raise RequestError(f"Block job '{job_id}' not found", kind=ErrorKind.DEVICE_NOT_ACTIVE)
    return job


def _job(services: Services, job_id: str) -> Job:
    job = services.jobs.get(job_id)
    if job is None:
        raise RequestError("Job not found")
    return job


async def _cancel(services: Services, job: Job) -> None:
    """Cancel, and see the end of a job that has nothing to wait for, so that its events come first."""
    is_at_rest = not job.busy
    job.cancel()
    if is_at_rest:
        await services.devices.changing.unless_hanging(job.wait_ended)


async def _finalize(services: Services, job: Job) -> None:
    job.begin_to_finalize()
    await services.devices.changing.unless_hanging(job.wait_ended)


@TABLE.command("block-job-set-speed", oob=True)
async def block_job_set_speed(services: Services, arguments: BlockJobSetSpeedArguments) -> None:
    """Limit how fast a job copies."""
    _block_job(services, arguments.device).set_speed(arguments.speed)


@TABLE.command("block-job-cancel")
async def block_job_cancel(services: Services, arguments: BlockJobCancelArguments) -> None:
    """End a job as soon as possible, unless it is paused and `force` is not given."""
    job = _block_job(services, arguments.device)
    if job.is_user_paused and not arguments.force:
        raise RequestError(f"The block job for device '{job.id}' is currently paused")
    await _cancel(services, job)


@TABLE.command("block-job-pause")
async def block_job_pause(services: Services, arguments: BlockJobArguments) -> None:
    """Pause a job."""
    _block_job(services, arguments.device).pause()


@TABLE.command("block-job-resume")
async def block_job_resume(services: Services, arguments: BlockJobArguments) -> None:
    """Resume a job that a client or an error has paused."""
    _block_job(services, arguments.device).resume()


@TABLE.command("block-job-complete")
async def block_job_complete(services: Services, arguments: BlockJobArguments) -> None:
    """End a job that is ready."""
    _block_job(services, arguments.device).complete()


@TABLE.command("block-job-finalize")
async def block_job_finalize(services: Services, arguments: JobArguments) -> None:
    """Let a pending job make its result permanent."""
    await _finalize(services, _block_job(services, arguments.id))


@TABLE.command("block-job-dismiss")
async def block_job_dismiss(services: Services, arguments: JobArguments) -> None:
    """Forget a concluded job."""
    services.jobs.dismiss(_block_job(services, arguments.id))


@TABLE.command("job-cancel", oob=True)
async def job_cancel(services: Services, arguments: JobArguments) -> None:
    """End a job as soon as possible."""
    await _cancel(services, _job(services, arguments.id))


@TABLE.command("job-pause", oob=True)
async def job_pause(services: Services, arguments: JobArguments) -> None:
    """Pause a job."""
    _job(services, arguments.id).pause()


@TABLE.command("job-resume")
async def job_resume(services: Services, arguments: JobArguments) -> None:
    """Resume a job that a client or an error has paused."""
    _job(services, arguments.id).resume()


@TABLE.command("job-complete")
async def job_complete(services: Services, arguments: JobArguments) -> None:
    """End a job that is ready."""
    _job(services, arguments.id).complete()


@TABLE.command("job-finalize")
async def job_finalize(services: Services, arguments: JobArguments) -> None:
    """Let a pending job make its result permanent."""
    await _finalize(services, _job(services, arguments.id))


@TABLE.command("job-dismiss")
async def job_dismiss(services: Services, arguments: JobArguments) -> None:
    """Forget a concluded job."""
    if not give_up(services, Kind.JOB, arguments.id):
        services.jobs.dismiss(_job(services, arguments.id))
