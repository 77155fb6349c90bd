"""Streams: the unified background copy as an API, whatever the formats of the images.

    job = await streams.start(StreamRequest(device.node, "vda", on_done=tell))
    streams.on(device)      job.cancel()

A stream has a filter in front of its active image and keeps every node from there down to, not
including, its base for itself; streams of disjoint parts of a chain run side by side.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

from blockd.block.chain import chain, format_of, unfiltered
from blockd.block.node import BlockNode, OverlayNode
from blockd.devices.backing_names import name_for
from blockd.devices.device import Device, Devices
from blockd.errors import BlockdError, RequestError
from blockd.filters.blkstream import BlkStream
from blockd.formats.add_cow.image import AddCowImage
from blockd.jobs.job import Job, OnError
from blockd.jobs.manager import JobManager, is_well_formed
from blockd.jobs.stream import GUEST_LATENCY_S, StreamJob

log = logging.getLogger(__name__)


class JobOptions(NamedTuple):
    """How any job is run."""

    speed: int = 0
    on_error: OnError = OnError.REPORT
    auto_finalize: bool = True
    auto_dismiss: bool = True


class StreamRequest(NamedTuple):
    """What to copy: all that the image at `top` lacks, down to, not including, `base` (None: everything).

    At the end `base` is the backing of the image, recorded as `backing_file` or under a name that leads
    there. `on_done` is called exactly once, also after a cancel.
    """

    top: BlockNode
    job_id: str
    base: BlockNode | None = None
    backing_file: str | None = None
    filter_node_name: str | None = None
    options: JobOptions = JobOptions()
    on_done: Callable[[Job], None] | None = None


class EmptyStream(Job):
    """The stream of an image that lacks nothing: at most the name of its backing file is written."""

    type = "stream"

    def __init__(self, request: StreamRequest, record: Callable[[], Awaitable[None]] | None) -> None:
        super().__init__(request.job_id, length=0, **request.options._asdict())
        self._record = record

    async def run(self) -> None:
        """Nothing is missing."""

    async def commit(self) -> None:
        if self._record is not None:
            await self._record()


class Stream(NamedTuple):
    """A stream under way."""

    job: StreamJob
    front: BlkStream
    # What it keeps for itself: from the active image down to, not including, the base.
    layers: list[BlockNode]
    # The active image is writable for the time of the stream only.
    was_read_only: bool
    # What the image records when the stream begins, and when it has succeeded.
    first_backing_file: str | None
    final_backing_file: str | None


class Streams:
    """Starts streams and knows which are running."""

    def __init__(self, devices: Devices, jobs: JobManager, guest_latency_s: float = GUEST_LATENCY_S) -> None:
        self._devices = devices
        self._jobs = jobs
        self._guest_latency_s = guest_latency_s
        self._running: dict[BlockNode, Stream] = {}
        # What was asked for, for as long as the job is there.
        self.requests: WeakKeyDictionary[Job, StreamRequest] = WeakKeyDictionary()

    def __iter__(self) -> Iterator[Stream]:
        """The streams whose end was not told yet."""
        return iter(list(self._running.values()))

    def on(self, device: Device) -> Stream | None:
        """The stream into a device's active image, or into what that was before the stream was done."""
        return self._running.get(device.active)

    async def start(self, request: StreamRequest) -> Job:
        """Start a stream.

        The job runs on return; one that has nothing to do has already ended, unless it waits to be
        finalized.

        Raises:   RequestError: the image cannot be written, `base` is not in its backing chain, or a part of
                  the chain is busy; nothing happened.
        """
        async with self._devices.changing:
            job = await self.place(request)
            self._jobs.start(job)
        if isinstance(job, EmptyStream) and job.auto_finalize:
            await job.wait_ended()
        return job

    async def place(self, request: StreamRequest) -> Job:
        """Make the job of a stream and put its filter in place; to be started, or cleaned without that.

        Locks:    the caller holds `Devices.changing`.
        """
        self._devices.require_present(request.top)
        active = unfiltered(request.top)
        layers = _layers(active, request.base)
        self.require_free(layers)
        self._jobs.check_id(request.job_id)
        self._require_unwritten(layers[1:], request.job_id)
        name = self._filter_name(request.filter_node_name)
        job: Job = EmptyStream(request, self._recording(active, request.backing_file))
        if len(layers) > 1:
            assert isinstance(active, OverlayNode), "only an overlay has layers below"
            active.require_streamable()
            was_read_only = active.read_only
            async with self._devices.drained(active):
                await self._devices.graph.set_read_only(active, False)
                front = BlkStream(active, request.base, name)
                job = self._put_in_front(front, request, layers, was_read_only)
        job.on_done = partial(self._forget, request.on_done)
        self.requests[job] = request
        return job

    def _forget(self, on_done: Callable[[Job], None] | None, job: Job) -> None:
        """End the record of a stream, for who asks is told of it until its completion is."""
        self._running = {image: stream for image, stream in self._running.items() if stream.job is not job}
        if on_done is not None:
            on_done(job)

    def _put_in_front(
        self, front: BlkStream, request: StreamRequest, layers: list[BlockNode], was_read_only: bool
    ) -> StreamJob:
        """Put the filter in front of its active image, to be taken away when the job ends."""
        active, base, backing_file = front.active, front.base, request.backing_file
        if base is not None and backing_file is None:
            backing_file = name_for(base, active)
        job = StreamJob(
            request.job_id,
            front,
            base_filename=backing_file,
            base_format=None if base is None else format_of(base),
            guest_latency_s=self._guest_latency_s,
            **request.options._asdict(),
        )
        stream = Stream(job, front, layers, was_read_only, active.backing_filename, backing_file)
        job.clean = partial(self._take_away, stream)
        self._devices.put_in_front(active, front)
        self._devices.graph.insert(front, f"job '{job.id}'")
        self._running[active] = stream
        return job

    def _recording(self, active: BlockNode, filename: str | None) -> Callable[[], Awaitable[None]] | None:
        """What an empty stream does, if it does anything: record the name of the backing file."""
        if filename is None:
            return None
        assert isinstance(active, OverlayNode), "only an overlay has a backing file"

        async def record() -> None:
            async with self._devices.changing:
                await self._devices.change_backing(active, filename)

        return record

    async def take_back(self, job: Job) -> None:
        """Undo `place` for a job that was not started.

        Locks:    the caller holds `Devices.changing`.
        """
        for stream in self:
            if stream.job is job:
                async with self._devices.drained(stream.front.active):
                    await self._remove_front(stream)
                del self._running[stream.front.active]

    async def _take_away(self, stream: Stream) -> None:
        """Take the filter away; after a success also the layers that nobody needs any more."""
        job, active = stream.job, stream.front.active
        loss = await stream.front.let_go()
        if loss is not None:
            log.error("job %s: writes that were not flushed are lost: %s", job.id, loss.message)
            self._devices.lose(active, loss)
        async with self._devices.changing:
            async with self._devices.drained(active):
                has_succeeded = job.error is None and not job.is_cancelled
                if has_succeeded:
                    active.backing = stream.layers[-1].backing
                await self._remove_front(stream)
                if has_succeeded:
                    self._go_on_with_image(stream)
            await self._devices.graph.close_unused()

    def _go_on_with_image(self, stream: Stream) -> None:
        """When everything is in the image of an add-cow file, leave that out of the way from now on."""
        job, active = stream.job, stream.front.active
        if isinstance(active, AddCowImage) and active.is_complete:
            job.plain_image = active.image.filename
            if self._devices.leave_add_cow(active):
                del self._running[active]
                self._running[active.image] = stream
                if self.requests[job].top is active:
                    self.requests[job] = self.requests[job]._replace(top=active.image)

    async def _remove_front(self, stream: Stream) -> None:
        self._devices.take_from_front(stream.front.active)
        self._devices.graph.take_out(stream.front)
        if stream.was_read_only:
            await self._make_read_only(stream.front.active)

    async def _make_read_only(self, active: BlockNode) -> None:
        if self._devices.has_writers(active):
            return  # it became a disk of its own meanwhile
        try:
            await self._devices.graph.set_read_only(active, True)
        except BlockdError as error:
            log.error("node %s stays writable: %s", active.node_name, error.message)

    def _filter_name(self, wanted: str | None) -> str:
        graph = self._devices.graph
        if wanted is None:
            return graph.generate_name()
        if not is_well_formed(wanted):
            raise RequestError(f"Could not create node: Invalid node-name: '{wanted}'")
        if wanted in graph.nodes:
            raise RequestError(f"Could not create node: Duplicate nodes with node-name='{wanted}'")
        return wanted

    def _require_unwritten(self, sources: list[BlockNode], job_id: str) -> None:
        """Refuse to copy from images that guests write."""
        for node in sources:
            if self._devices.has_writers(node):
                name = node.node_name
                raise RequestError(
                    f"Permission conflict on node '{name}': permissions 'write' are both required by an "
                    f"unnamed block device (uses node '{name}' as 'root' child) and unshared by stream job "
                    f"'{job_id}' (uses node '{name}' as 'intermediate node' child)."
                )

    def require_free(self, layers: list[BlockNode]) -> None:
        """Refuse layers that another job has for itself."""
        for stream in self._running.values():
            for node in layers:
                if node in stream.layers:
                    raise RequestError(
                        f"Node '{node.node_name}' is busy: block device is in use by block job: "
                        f"{stream.job.type}"
                    )


def _layers(active: BlockNode, base: BlockNode | None) -> list[BlockNode]:
    """The nodes from `active` down to, not including, `base`."""
    nodes = list(chain(active))
    if base is None:
        return nodes
    if base not in nodes[1:]:
        raise RequestError(f"Can't find '{base.filename}' in the backing chain")
    return nodes[: nodes.index(base)]
