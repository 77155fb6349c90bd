"""Makes the daemon again what the journal says it was."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

from blockd.block.chain import unfiltered
from blockd.commands.context import Services
from blockd.commands.stream import stream_teller
from blockd.daemon.ended_job import EndedJob, concluded_job
from blockd.daemon.state import (
    ExportRecord,
    InetPlace,
    JobRecord,
    MonitorRecord,
    NbdServerRecord,
    State,
    StreamRecord,
    UnixPlace,
)
from blockd.devices.streams import JobOptions, StreamRequest
from blockd.drivers.opening import Restored
from blockd.errors import BlockdError
from blockd.formats.add_cow.image import AddCowImage
from blockd.jobs.job import Job, JobGroup
from blockd.qmp.server import QmpServer

log = logging.getLogger(__name__)


async def restore(services: Services, state: State) -> None:
    """Open the nodes, serve the exports and start the jobs of an earlier run.

    A job that cannot be started again does not keep guests from their disks: it is told as failed.

    Raises:   BlockdError: a disk or the NBD server cannot be brought back.
    """
    for group in state.throttle_groups:
        await services.objects.add({"qom-type": "throttle-group", "id": group.id, "limits": group.limits})
    nodes = [Restored(dict(record.options), record.backings, record.is_added) for record in state.nodes]
    await services.graph.restore(nodes, state.allowed_files)
    for device in state.devices:
        services.devices.add(device.name, services.graph[device.node])
    if state.nbd_server is not None:
        await _restore_nbd_server(services, state.nbd_server)
    for export in state.exports:
        await _restore_export(services, export)
    # Layers that a stream had made superfluous when the run ended.
    await services.graph.close_unused()
    await _restore_jobs(services, state.jobs)
    await _leave_add_cow_files(services)


async def _leave_add_cow_files(services: Services) -> None:
    """Go on with plain images where the last run ended before it could."""
    async with services.devices.changing:
        for device in services.devices.all:
            overlay = device.node
            if isinstance(overlay, AddCowImage) and overlay.is_complete:
                async with services.devices.drained(overlay):
                    services.devices.leave_add_cow(overlay)
        await services.graph.close_unused()


async def restore_monitors(qmp: QmpServer[Services], monitors: Iterable[MonitorRecord]) -> None:
    """Serve QMP where the earlier run did."""
    for monitor in monitors:
        match monitor.place:
            case UnixPlace(path=path):
                await qmp.listen_unix(path, pretty=monitor.is_pretty)
            case InetPlace(host=host, port=port):
                await qmp.listen_tcp(host, port, pretty=monitor.is_pretty)


# -- exports -----------------------------------------------------------------------------------


async def _restore_nbd_server(services: Services, record: NbdServerRecord) -> None:
    server = services.exports.start_server(record.max_connections)
    for place in record.places:
        match place:
            case UnixPlace(path=path):
                server.listen_unix(path)
            case InetPlace(host=host, port=port):
                await server.listen_tcp(host, port)


async def _restore_export(services: Services, record: ExportRecord) -> None:
    await services.exports.add(
        record.id,
        services.graph[record.node],
        name=record.name,
        description=record.description,
        writable=record.is_writable,
    )


# -- jobs --------------------------------------------------------------------------------------


async def _restore_jobs(services: Services, records: Sequence[JobRecord]) -> None:
    """Put all of them in place before the first one starts: members of a group must know of each other."""
    cancelled_groups = {record.group for record in records if record.is_cancelled} - {None}
    groups: defaultdict[int, JobGroup] = defaultdict(JobGroup)
    jobs: list[Job] = []
    async with services.devices.changing:
        for record in records:
            is_cancelled = record.is_cancelled or record.group in cancelled_groups
            jobs.append(await _placed(services, record, is_cancelled=is_cancelled))
            if record.group is not None and not isinstance(jobs[-1], EndedJob):
                groups[record.group].add(jobs[-1])
    for record, job in zip(records, jobs, strict=True):
        if record.is_concluded:
            services.jobs.add_concluded(job)
            continue
        services.jobs.start(job)
        if isinstance(job, EndedJob) and job.was_cancelled:
            job.cancel()
        elif record.is_paused and not isinstance(job, EndedJob):
            job.pause()


async def _placed(services: Services, record: JobRecord, *, is_cancelled: bool) -> Job:
    """The job of a record, to be started."""
    if record.is_concluded:
        return concluded_job(record)
    job = await _again(services, record, is_cancelled=is_cancelled)
    if isinstance(job, EndedJob) and record.stream is not None and record.stream.is_classic:
        job.on_done = stream_teller(services, job.id)
    return job


async def _again(services: Services, record: JobRecord, *, is_cancelled: bool) -> Job:
    if record.stream is None:
        return EndedJob(record, failure=f"blockd ended while the job '{record.id}' was running")
    if record.length and _is_done(services, record.stream):
        log.info("job %s had done its work when the last run ended", record.id)
        return EndedJob(_with_plain_image(services, record, record.stream))
    if is_cancelled:
        return EndedJob(record, was_cancelled=True)
    try:
        return await services.streams.place(_request(services, record, record.stream))
    except BlockdError as error:
        log.error("job %s cannot go on: %s", record.id, error.message)
        return EndedJob(record, failure=error.message)


def _with_plain_image(services: Services, record: JobRecord, stream: StreamRecord) -> JobRecord:
    """The record of a job that has made a plain image complete, which takes the place of its add-cow file."""
    active = services.graph[stream.node]
    if not isinstance(active, AddCowImage) or not active.is_complete:
        return record
    left = stream.model_copy(update={"node": active.image.node_name})
    return record.model_copy(update={"stream": left, "plain_image": active.image.filename})


def _is_done(services: Services, stream: StreamRecord) -> bool:
    """Whether the final base is the backing already, as the image itself says; see `NodeRecord.backings`."""
    backing = unfiltered(services.graph[stream.node]).backing
    return (unfiltered(backing).node_name if backing is not None else None) == stream.base


def _request(services: Services, record: JobRecord, stream: StreamRecord) -> StreamRequest:
    graph = services.graph
    return StreamRequest(
        graph[stream.node],
        record.id,
        base=graph[stream.base] if stream.base is not None else None,
        backing_file=stream.backing_file,
        filter_node_name=stream.filter_node_name,
        options=JobOptions(record.speed, record.on_error, record.auto_finalize, record.auto_dismiss),
        on_done=stream_teller(services, record.id) if stream.is_classic else None,
    )
