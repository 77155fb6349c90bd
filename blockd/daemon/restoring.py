"""Makes the daemon again what the journal says it was, as far as that can be."""

import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Container, Iterable, Sequence
from functools import partial

from blockd.block.chain import all_below, unfiltered
from blockd.block.node import BlockNode, OverlayNode
from blockd.commands.context import Services
from blockd.commands.stream import stream_teller
from blockd.daemon.ended_job import EndedJob, concluded_job
from blockd.daemon.left_out import Attempts, log_left_out
from blockd.daemon.staged_file import KeptWrites, births_of
from blockd.daemon.state import (
    DeviceRecord,
    ExportRecord,
    InetPlace,
    JobRecord,
    LostWritesRecord,
    MonitorRecord,
    NbdServerRecord,
    State,
    StreamRecord,
    ThrottleGroupRecord,
    UnixPlace,
)
from blockd.devices.left_out import Kind
from blockd.devices.stream_request import JobOptions, StreamRequest
from blockd.drivers.opening import Restored
from blockd.drivers.sharing import files_of
from blockd.errors import BlockdError, RequestError
from blockd.exports.nbd.server import NbdServer
from blockd.formats.add_cow.image import AddCowImage
from blockd.jobs.group import JobGroup
from blockd.jobs.job import Job
from blockd.qmp.server import QmpServer

log = logging.getLogger(__name__)


async def restore(
    services: Services, state: State, kept: Iterable[KeptWrites] = (), *, is_strict: bool
) -> None:
    """Open the nodes, serve the exports and start the jobs of an earlier run.

    What it has `kept` of guests' writes is in place before the first guest can read.

    What cannot be brought back is left out: see `Services.left_out`. A job that cannot be started again
    though its nodes are there is told as failed.

    Raises:   BlockdError: the NBD server cannot be brought back, or something else, and that is strict.
    """
    try:
        await _restore(services, state, kept, is_strict=is_strict)
    finally:
        log_left_out(services.left_out)


async def _restore(services: Services, state: State, kept: Iterable[KeptWrites], *, is_strict: bool) -> None:
    attempt = Attempts(services.left_out, is_strict=is_strict)
    for group in state.throttle_groups:
        await attempt(Kind.THROTTLE_GROUP, group.id, partial(_restore_throttle_group, services, group))
    nodes = [
        Restored(dict(record.options), record.backings, record.is_added, record.is_told_read_only)
        for record in state.nodes
    ]
    await services.graph.restore(nodes, state.allowed_files, partial(_attempt_node, services, attempt))
    for device in state.devices:
        await attempt(Kind.DEVICE, device.name, partial(_restore_device, services, device), node=device.node)
    _restore_losses(services, state.lost_writes)
    for writes in kept:
        name = writes.record.node
        if not await attempt(Kind.NODE, name, partial(_restore_staged, services, writes)):
            await _leave_out_all_on(services, attempt, services.graph[name])
    if state.nbd_server is not None:
        await _restore_nbd_server(services, state.nbd_server)
    for export in state.exports:
        await attempt(Kind.EXPORT, export.id, partial(_restore_export, services, export), node=export.node)
    jobs = _restorable(services, attempt, state.jobs)
    done = {
        job.id for job in jobs if job.length and job.stream is not None and _is_done(services, job.stream)
    }
    # Layers that a stream had made superfluous when the run ended, or whose overlay is left out.
    await services.graph.close_unused()
    await _restore_jobs(services, jobs, done)
    await _leave_add_cow_files(services)


def _restore_losses(services: Services, records: Iterable[LostWritesRecord]) -> None:
    """Let disks know what they have lost, as far as they are there."""
    for record in records:
        if (node := services.graph.nodes.get(record.node)) is not None:
            services.devices.note_loss(unfiltered(node), record.why)


async def _restore_staged(services: Services, writes: KeptWrites) -> None:
    """Stage again what was staged for an image, if it is there."""
    record = writes.record
    image = services.graph.nodes.get(record.node)
    if image is None:
        log.error("guest writes are kept in '%s' for node %s, which is not there", record.file, record.node)
    elif writes.pieces is None:
        services.devices.lose(unfiltered(image), record.length, f"'{record.file}' is damaged or not there")
    elif isinstance(image, OverlayNode):
        if record.births and await births_of(image) != record.births:
            raise RequestError(
                f"'{image.filename}' is another file than that for which guest writes are kept in "
                f"'{record.file}': put that one back and start again, or give them up with blockdev-del"
            )
        try:
            await services.streams.stage_again(image, writes.pieces, record)
        except BlockdError as error:
            raise RequestError(
                f"guest writes kept in '{record.file}' cannot be staged again: {error.message}",
                kind=error.kind,
            ) from error


async def _leave_out_all_on(services: Services, attempt: Attempts, image: BlockNode) -> None:
    """Close an image that is left out, and leave out what is on it: exports and jobs are still to come."""
    above = [node for node in services.graph.nodes.values() if image in all_below(node)]
    for node in above:
        if node is not image:
            attempt.leave_out(Kind.NODE, node.node_name, needs=image.node_name, missing=image.node_name)
        services.graph.disown(node)
    for device in services.devices:
        if device.node in above:
            attempt.leave_out(Kind.DEVICE, device.name, needs=device.node.node_name, missing=image.node_name)
            await services.devices.remove(device)
    await services.graph.close_unused()


async def _restore_throttle_group(services: Services, group: ThrottleGroupRecord) -> None:
    await services.objects.add({"qom-type": "throttle-group", "id": group.id, "limits": group.limits})


async def _attempt_node(
    services: Services, attempt: Attempts, node: Restored, restore: Callable[[], Awaitable[None]]
) -> bool:
    below = [str(node.options[role]) for role in ("file", "image") if role in node.options]
    missing = [name for name in below if services.left_out.get(Kind.NODE, name) is not None]
    is_there = await attempt(Kind.NODE, node.node_name, restore, node=missing[0] if missing else None)
    if node.is_added:  # with all that is below it, which was locked as if it was to be used in any way
        await services.devices.adjust_locks()
    return is_there


async def _restore_device(services: Services, device: DeviceRecord) -> None:
    services.devices.add(device.name, services.graph[device.node])


async def _leave_add_cow_files(services: Services) -> None:
    """Go on with plain images where the last run ended before it could."""
    async with services.devices.change_unasked():
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
    async def listen(server: NbdServer) -> None:
        for place in record.places:
            match place:
                case UnixPlace(path=path):
                    await server.listen_unix(path)
                case InetPlace(host=host, port=port):
                    await server.listen_tcp(host, port)

    await services.exports.start_server(listen, record.max_connections)


async def _restore_export(services: Services, record: ExportRecord) -> None:
    await services.exports.add(
        record.id,
        services.graph[record.node],
        name=record.name,
        description=record.description,
        writable=record.is_writable,
        writethrough=record.is_writethrough,
        allocation_depth=record.tells_depth,
    )


# -- jobs --------------------------------------------------------------------------------------


def _restorable(services: Services, attempt: Attempts, records: Sequence[JobRecord]) -> list[JobRecord]:
    """The jobs whose nodes are there; of a group all or none."""
    missing: dict[str, str] = {}
    for record in records:
        names = [name for name in (record.stream.node, record.stream.base) if name] if record.stream else []
        out = [name for name in names if services.left_out.get(Kind.NODE, name) is not None]
        if out:
            missing[record.id] = out[0]
    without = {record.group: missing[record.id] for record in records if record.id in missing}
    found = []
    for record in records:
        node = missing.get(record.id) or (without.get(record.group) if record.group is not None else None)
        if node is None:
            found.append(record)
        else:
            attempt.leave_out(Kind.JOB, record.id, needs=node, missing=node)
    return found


async def _restore_jobs(services: Services, records: Sequence[JobRecord], done: Container[str]) -> None:
    """Put all of them in place before the first one starts: members of a group must know of each other."""
    cancelled_groups = {record.group for record in records if record.is_cancelled} - {None}
    groups: defaultdict[int, JobGroup] = defaultdict(JobGroup)
    jobs: list[Job] = []
    async with services.devices.change_unasked():
        for record in records:
            is_cancelled = record.is_cancelled or record.group in cancelled_groups
            jobs.append(await _placed(services, record, done, is_cancelled=is_cancelled))
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


async def _placed(services: Services, record: JobRecord, done: Container[str], *, is_cancelled: bool) -> Job:
    """The job of a record, to be started."""
    if record.is_concluded:
        return concluded_job(record)
    job = await _again(services, record, done, is_cancelled=is_cancelled)
    if isinstance(job, EndedJob) and record.stream is not None and record.stream.is_classic:
        job.on_done = stream_teller(services, job.id)
    return job


async def _again(services: Services, record: JobRecord, done: Container[str], *, is_cancelled: bool) -> Job:
    if record.stream is None:
        return EndedJob(record, failure=f"blockd ended while the job '{record.id}' was running")
    try:
        if record.id in done:
            log.info("job %s had done its work when the last run ended", record.id)
            return EndedJob(_with_plain_image(services, record, record.stream))
        if is_cancelled:
            return EndedJob(record, was_cancelled=True)
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
    """Whether the final base is the backing already, as the image itself says; see `NodeRecord.backings`.

    The image may name it in another way than any that is recorded: which file was found is what counts.

    Needs:    nodes that are not in use any more are still there.
    """
    nodes = services.graph.nodes
    image = nodes.get(stream.node)
    base = nodes.get(stream.base) if stream.base is not None else None
    if image is None:
        return False
    backing = unfiltered(image).backing
    if backing is None or base is None:
        return backing is None and stream.base is None
    found = unfiltered(backing)
    return found is base or (found.driver == base.driver and _places(found) == _places(base) != [])


def _places(image: BlockNode) -> list[tuple[int, int]]:
    """Which files an image is in."""
    return [file.identity() for file in files_of(image)]


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
