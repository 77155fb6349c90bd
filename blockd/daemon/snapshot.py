"""The state of the running daemon, as it is recorded.

Taken in one go, while no change is half done (see `Recorder`): it is consistent. The filters of jobs are left
out, for a job that is started again puts its own in place.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from blockd.block.chain import chain
from blockd.block.node import BlockNode, OverlayNode
from blockd.commands.context import Services
from blockd.config import InetAddress, UnixAddress
from blockd.daemon.ended_job import EndedJob
from blockd.daemon.left_out import Unplaced
from blockd.daemon.options import ServedMonitor
from blockd.daemon.state import (
    DeviceRecord,
    ExportRecord,
    InetPlace,
    JobRecord,
    LostWritesRecord,
    MonitorRecord,
    NbdServerRecord,
    NodeRecord,
    Place,
    StagedRecord,
    State,
    StreamRecord,
    Things,
    ThrottleGroupRecord,
    UnixPlace,
)
from blockd.devices.device import Device
from blockd.devices.draining import InsertedFilter
from blockd.devices.exports import Offer
from blockd.devices.stream_request import StreamRequest
from blockd.filenames import absolute
from blockd.filters.blkstream import BlkStream
from blockd.filters.throttle import Throttle
from blockd.jobs.group import JobGroup
from blockd.jobs.job import IoStatus, Job
from blockd.jobs.states import JobStatus
from blockd.protocols.file import FileNode

# Told by the node itself, or in a member of the record.
_LIVE_OPTIONS = ("node-name", "read-only", "backing", "file", "image")


class Rest(NamedTuple):
    """What no service knows."""

    given: Mapping[str, str]
    monitors: Sequence[MonitorRecord]
    image_paths: Sequence[str]
    unplaced: Unplaced | None
    left_out: Things | None


def take_state(services: Services, ending: Job | None, rest: Rest) -> State:
    """All of it; the end of the job `ending` counts as told."""
    nodes = NodeRecords(services)
    return State(
        nodes=nodes.take(),
        devices=device_records(services, nodes),
        exports=export_records(services, nodes),
        jobs=job_records(services, nodes, ending),
        allowed_files=services.graph.image_paths.allowed_files,
        **small_parts(services, nodes, rest),
    )


def small_parts(services: Services, nodes: "NodeRecords", rest: Rest) -> dict[str, Any]:
    """The fields of `State` that do not become more with the number of disks."""
    unplaced = rest.unplaced
    return {
        "throttle_groups": throttle_group_records(services),
        "nbd_server": nbd_server_record(services),
        "staged": [*(unplaced.staged if unplaced else ()), *kept_records(services)],
        "lost_writes": [
            *(unplaced.lost_writes if unplaced else ()),
            *lost_writes_records(services, nodes),
        ],
        "given": dict(rest.given),
        "monitors": list(rest.monitors),
        "image_paths": list(rest.image_paths),
        "left_out": rest.left_out,
    }


class NodeRecords:
    """Describes the nodes of the graph."""

    def __init__(self, services: Services) -> None:
        self._graph = services.graph
        self._devices = services.devices
        self._changing_names = services.devices.changing_names
        asked = [request for job, request in services.streams.requests.items() if _goes_on(job)]
        nodes = [node for request in asked for node in (request.top, request.base) if node is not None]
        self._asked = [node for node in nodes if self._graph.nodes.get(node.node_name) is node]
        in_place = [stream for stream in services.streams if stream.front.node_name in self._graph.nodes]
        self._streams: dict[OverlayNode, InsertedFilter] = {
            stream.front.active: stream for stream in in_place
        }
        self._fronts: dict[BlockNode, BlockNode] = {stream.front: stream.front.active for stream in in_place}
        self._read_only = {node for stream in in_place for node in self._writable_for(stream)}

    def _writable_for(self, stream: InsertedFilter) -> Iterator[BlockNode]:
        """What is writable only because the stream runs."""
        if stream.was_read_only:
            yield stream.front.active
            yield from self._graph.owned_parts(stream.front.active)

    def take(self) -> list[NodeRecord]:
        """All nodes that stay, each after those below it."""
        ordered: dict[BlockNode, None] = {}

        def visit(node: BlockNode) -> None:
            for child in node.children().values():
                visit(self._below(child))
            ordered.setdefault(node)

        used = [device.node for device in self._devices.all]
        # What somebody has who is recorded too; others are gone when their command is over, or its job.
        for node in (*filter(self._graph.is_added, self._graph.nodes.values()), *used, *self._asked):
            visit(self._below(node))
        return [self.record(node) for node in ordered]

    def is_recorded(self, node: BlockNode) -> bool:
        """Whether `take` tells of a node."""
        return node not in self._fronts and self._is_needed(node)

    def _is_needed(self, node: BlockNode) -> bool:
        if self._graph.is_added(node) or self._devices.at(node) or node in self._asked:
            return True
        return any(self._is_needed(parent) for parent, _ in self._graph.parents(node))

    def context(self) -> dict[BlockNode, object]:
        """What the records of nodes follow from besides the graph: streams, and names that are changing."""
        found: dict[BlockNode, list[object]] = {}
        for node in self._asked:
            found.setdefault(node, []).append("asked")
        for node in self._read_only:
            found.setdefault(node, []).append("read-only but for a stream")
        for active, stream in self._streams.items():
            found.setdefault(active, []).append(self._backings(active))
            found.setdefault(stream.front, []).append(active)
        for image in self._changing_names:
            found.setdefault(image, []).append(self._backings(image))
        return {**found}

    def name(self, node: BlockNode | None) -> str:
        """The name of the node that is there without the filters of jobs; "" for no node."""
        return "" if node is None else self._below(node).node_name

    def _below(self, node: BlockNode) -> BlockNode:
        return self._fronts.get(node, node)

    def record(self, node: BlockNode) -> NodeRecord:
        return NodeRecord.model_validate(
            {
                "options": self._options(node),
                "backings": self._backings(node) if isinstance(node, OverlayNode) else None,
                "is_added": self._graph.is_added(node),
                "is_told_read_only": self._graph.is_told_read_only(node),
            }
        )

    def _options(self, node: BlockNode) -> dict[str, object]:
        told = self._graph.options(node)
        options = {name: value for name, value in told.items() if name not in _LIVE_OPTIONS}
        options["driver"] = told.get("driver", node.driver)
        options["node-name"] = node.node_name
        options["read-only"] = node.read_only or node in self._read_only
        if isinstance(node, FileNode):
            options["filename"] = absolute(node.filename)
        if "config" in options:
            options["config"] = absolute(str(options["config"]))
        if isinstance(node, Throttle):
            options["throttle-group"] = node.group.name
        if isinstance(node, BlkStream) and not self._has_bottom(node):
            options.pop("bottom", None)
        for role, child in node.children().items():
            if role != "backing":
                options[role] = self.name(child)
        return options

    def _has_bottom(self, front: BlkStream) -> bool:
        bottom = self._graph.options(front).get("bottom")
        return any(node.node_name == bottom for node in chain(front))

    def _backings(self, overlay: OverlayNode) -> dict[str, str]:
        backings = {overlay.backing_filename or "": self.name(overlay.backing)}
        stream = self._streams.get(overlay)
        if stream is not None:
            backings = {stream.first_backing_file or "": self.name(overlay.backing)}
            backings.setdefault(stream.final_backing_file or "", self.name(stream.layers[-1].backing))
        if overlay in self._changing_names:
            backings.setdefault(self._changing_names[overlay] or "", self.name(overlay.backing))
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
    return [device_record(device, nodes) for device in services.devices]


def device_record(device: Device, nodes: NodeRecords) -> DeviceRecord:
    """A device that has a name."""
    return DeviceRecord(name=device.name, node=nodes.name(device.node))


# -- guests' writes ----------------------------------------------------------------------------


def kept_records(services: Services, but: Sequence[BlkStream] = ()) -> list[StagedRecord]:
    """What an earlier run has kept and the images do not hold durably yet, but for some filters."""
    found = [inserted.kept for inserted in services.streams if inserted.front not in but]
    return [record for record in found if isinstance(record, StagedRecord)]


def lost_writes_records(services: Services, nodes: NodeRecords) -> list[LostWritesRecord]:
    """The losses that not every guest knows of."""
    return [LostWritesRecord(node=nodes.name(node), why=why) for node, why in services.devices.losses]


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
    places: list[Place] = [
        UnixPlace(path=place) if isinstance(place, str) else InetPlace(host=place[0], port=place[1])
        for place in server.places
    ]
    return NbdServerRecord(places=places, max_connections=server.max_connections)


def export_records(services: Services, nodes: NodeRecords) -> list[ExportRecord]:
    """The exports, the oldest first."""
    return [export_record(offer, nodes) for offer in reversed(list(services.exports))]


def export_record(offer: Offer, nodes: NodeRecords) -> ExportRecord:
    """An export."""
    return ExportRecord(
        id=offer.export.export_id,
        node=nodes.name(offer.device.node),
        name=offer.export.name,
        description=offer.export.description,
        is_writable=offer.export.writable,
        is_writethrough=offer.export.writethrough,
        tells_depth=offer.export.allocation_depth,
    )


# -- jobs --------------------------------------------------------------------------------------


def job_records(services: Services, nodes: NodeRecords, ending: Job | None) -> list[JobRecord]:
    """The jobs, the oldest first; the end of `ending` counts as told."""
    records = []
    groups: list[JobGroup] = []
    placed = [job for job in services.streams.requests if job.status is JobStatus.UNDEFINED]
    for job in [*reversed(list(services.jobs)), *placed]:
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


def _goes_on(job: Job) -> bool:
    """Whether a job has an end before it."""
    return job.status not in (JobStatus.CONCLUDED, JobStatus.NULL)


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
        error=job.error_text if job.error else None,
        error_detail=job.error_detail,
    )


def _stream(request: StreamRequest, nodes: NodeRecords) -> StreamRecord:
    return StreamRecord(
        node=nodes.name(request.top),
        base=nodes.name(request.base) or None,
        backing_file=request.backing_file,
        filter_node_name=request.filter_node_name,
        is_classic=request.on_done is not None,
    )
