"""The state of the running daemon, as it is recorded.

Taken in one go, without waiting: it is consistent. The filters of jobs are left out, for a job that is
started again puts its own in place.
"""

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence

from blockd.block.chain import chain
from blockd.block.node import BlockNode, OverlayNode, ProtocolNode
from blockd.commands.context import Services
from blockd.config import InetAddress, UnixAddress
from blockd.daemon.ended_job import EndedJob
from blockd.daemon.options import ServedMonitor
from blockd.daemon.state import (
    DeviceRecord,
    ExportRecord,
    InetPlace,
    JobRecord,
    MonitorRecord,
    NbdServerRecord,
    NodeRecord,
    Place,
    State,
    StreamRecord,
    ThrottleGroupRecord,
    UnixPlace,
)
from blockd.devices.streams import Stream, StreamRequest
from blockd.exports.nbd.server import NbdServer
from blockd.filters.blkstream import BlkStream
from blockd.filters.throttle import Throttle
from blockd.jobs.job import IoStatus, Job, JobGroup
from blockd.jobs.states import JobStatus
from blockd.protocols.file import FileNode

# Told by the node itself, or in a member of the record.
_LIVE_OPTIONS = ("node-name", "read-only", "backing", "file", "image")


def take_state(
    services: Services,
    ending: Job | None,
    *,
    given: Mapping[str, str],
    monitors: Sequence[MonitorRecord],
    image_paths: Sequence[str],
) -> State:
    """All of it; the end of the job `ending` counts as told, and the rest is what no service knows."""
    nodes = NodeRecords(services)
    return State(
        throttle_groups=throttle_group_records(services),
        nodes=nodes.take(),
        devices=device_records(services, nodes),
        nbd_server=nbd_server_record(services),
        exports=export_records(services, nodes),
        jobs=job_records(services, nodes, ending),
        given=dict(given),
        monitors=list(monitors),
        image_paths=list(image_paths),
        allowed_files=services.graph.allowed_files,
    )


class NodeRecords:
    """Describes the nodes of the graph."""

    def __init__(self, services: Services) -> None:
        self._graph = services.graph
        in_place = [stream for stream in services.streams if stream.front.node_name in self._graph.nodes]
        self._streams = {stream.front.active: stream for stream in in_place}
        self._fronts: dict[BlockNode, BlockNode] = {stream.front: stream.front.active for stream in in_place}
        self._read_only = {node for stream in in_place for node in self._writable_for(stream)}

    def _writable_for(self, stream: Stream) -> Iterator[BlockNode]:
        """What is writable only because the stream runs."""
        if stream.was_read_only:
            yield stream.front.active
            yield from self._graph.owned_parts(stream.front.active)

    def take(self) -> list[NodeRecord]:
        """All nodes, each after those below it."""
        ordered: dict[BlockNode, None] = {}

        def visit(node: BlockNode) -> None:
            for child in node.children().values():
                visit(self._below(child))
            ordered.setdefault(node)

        for node in self._graph.nodes.values():
            visit(self._below(node))
        return [self._record(node) for node in ordered]

    def name(self, node: BlockNode | None) -> str:
        """The name of the node that is there without the filters of jobs; "" for no node."""
        return "" if node is None else self._below(node).node_name

    def _below(self, node: BlockNode) -> BlockNode:
        return self._fronts.get(node, node)

    def _record(self, node: BlockNode) -> NodeRecord:
        return NodeRecord.model_validate(
            {
                "options": self._options(node),
                "backings": self._backings(node) if isinstance(node, OverlayNode) else None,
                "is_added": self._graph.is_added(node),
            }
        )

    def _options(self, node: BlockNode) -> dict[str, object]:
        told = self._graph.options(node)
        options = {name: value for name, value in told.items() if name not in _LIVE_OPTIONS}
        options["driver"] = told.get("driver", node.driver)
        options["node-name"] = node.node_name
        options["read-only"] = node.read_only or node in self._read_only
        if isinstance(node, FileNode):
            options["filename"] = os.path.abspath(node.filename)  # noqa: PTH100  (links stay as they are)
        if isinstance(node, Throttle):
            options["throttle-group"] = node.group.name
        if isinstance(node, BlkStream) and not self._has_bottom(node):
            options.pop("bottom", None)
        for role, child in node.children().items():
            if role != "backing":
                options[self._option_of(node, role)] = self.name(child)
        return options

    def _option_of(self, node: BlockNode, role: str) -> str:
        """The option that tells the child in a role: filters of protocol nodes have another word for it."""
        is_in_front = isinstance(node, ProtocolNode) and "image" in self._graph.options(node)
        return "image" if is_in_front else role

    def _has_bottom(self, front: BlkStream) -> bool:
        bottom = self._graph.options(front).get("bottom")
        return any(node.node_name == bottom for node in chain(front))

    def _backings(self, overlay: OverlayNode) -> dict[str, str]:
        backings = {overlay.backing_filename or "": self.name(overlay.backing)}
        stream = self._streams.get(overlay)
        if stream is not None:
            backings = {stream.first_backing_file or "": self.name(overlay.backing)}
            backings.setdefault(stream.final_backing_file or "", self.name(stream.layers[-1].backing))
        return backings


def throttle_group_records(services: Services) -> list[ThrottleGroupRecord]:
    """The throttle groups with their limits of now."""
    return [
        ThrottleGroupRecord(id=object_id, limits=dict(found.throttle_group.limits))
        for object_id, found in services.objects
        if found.throttle_group is not None
    ]


def device_records(services: Services, nodes: NodeRecords) -> list[DeviceRecord]:
    """The devices that have a name."""
    return [DeviceRecord(name=device.name, node=nodes.name(device.node)) for device in services.devices]


# -- servers and exports -----------------------------------------------------------------------


def monitor_records(monitors: Iterable[ServedMonitor]) -> list[MonitorRecord]:
    """Where QMP is served."""
    return [MonitorRecord(place=_place(address), is_pretty=is_pretty) for address, is_pretty in monitors]


def _place(address: UnixAddress | InetAddress) -> Place:
    if isinstance(address, UnixAddress):
        return UnixPlace(path=address.path)
    return InetPlace(host=address.host, port=address.port)


def nbd_server_record(services: Services) -> NbdServerRecord | None:
    """The NBD server, if it runs."""
    server = services.exports.server
    if server is None:
        return None
    return NbdServerRecord(places=list(_places(server)), max_connections=server.max_connections)


def _places(server: NbdServer) -> Iterator[Place]:
    for listener in server.sockets:
        name = listener.getsockname()
        if listener.family == socket.AF_UNIX:
            yield UnixPlace(path=os.path.abspath(name))  # noqa: PTH100  (links stay as they are)
        else:
            yield InetPlace(host=name[0], port=name[1])


def export_records(services: Services, nodes: NodeRecords) -> list[ExportRecord]:
    """The exports, the oldest first."""
    return [
        ExportRecord(
            id=offer.export.export_id,
            node=nodes.name(offer.device.node),
            name=offer.export.name,
            description=offer.export.description,
            is_writable=offer.export.writable,
        )
        for offer in reversed(list(services.exports))
    ]


# -- jobs --------------------------------------------------------------------------------------


def job_records(services: Services, nodes: NodeRecords, ending: Job | None) -> list[JobRecord]:
    """The jobs, the oldest first; the end of `ending` counts as told."""
    records = []
    groups: list[JobGroup] = []
    for job in reversed(list(services.jobs)):
        is_concluded = job is ending or job.status is JobStatus.CONCLUDED
        if job.status is JobStatus.NULL or (is_concluded and job.auto_dismiss):
            continue
        if is_concluded:
            records.append(_concluded(job))
        elif isinstance(job, EndedJob):
            records.append(job.record)
        else:
            if job.group is not None and job.group not in groups:
                groups.append(job.group)
            group = groups.index(job.group) if job.group is not None else None
            records.append(_live(job, group, services.streams.requests.get(job), nodes))
    return records


def _live(job: Job, group: int | None, request: StreamRequest | None, nodes: NodeRecords) -> JobRecord:
    return JobRecord(
        id=job.id,
        type=job.type,
        stream=_stream(request, nodes) if request is not None else None,
        speed=job.speed,
        on_error=job.on_error,
        auto_finalize=job.auto_finalize,
        auto_dismiss=job.auto_dismiss,
        group=group,
        is_paused=job.is_user_paused and job.io_status is IoStatus.OK,
        is_cancelled=job.is_cancelled,
        length=job.length,
        plain_image=job.plain_image,
    )


def _concluded(job: Job) -> JobRecord:
    return JobRecord(
        id=job.id,
        type=job.type,
        stream=None,
        speed=job.speed,
        on_error=job.on_error,
        auto_finalize=job.auto_finalize,
        auto_dismiss=job.auto_dismiss,
        group=None,
        is_paused=False,
        is_cancelled=job.is_cancelled,
        length=job.length,
        offset=job.offset,
        is_concluded=True,
        error=job.error.message if job.error else None,
    )


def _stream(request: StreamRequest, nodes: NodeRecords) -> StreamRecord:
    return StreamRecord(
        node=nodes.name(request.top),
        base=nodes.name(request.base) or None,
        backing_file=request.backing_file,
        filter_node_name=request.filter_node_name,
        is_classic=request.on_done is not None,
    )
