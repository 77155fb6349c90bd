"""Streams: the unified background copy as an API, whatever the formats of the images.

    job = await streams.start(StreamRequest(device.node, "vda", on_done=tell))
    streams.on(device)      job.cancel()

A stream has a filter in front of its active image and keeps every node from there down to, not
including, its base for itself; streams of disjoint parts of a chain run side by side.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from weakref import WeakKeyDictionary

from blockd.aio import in_thread
from blockd.block.chain import chain, chain_with_filters, format_of, unfiltered
from blockd.block.node import BlockNode, Buffer, OverlayNode
from blockd.block.permissions import CONSISTENT_READ, WRITE, WRITE_UNCHANGED, Permission
from blockd.devices.backing_names import name_for
from blockd.devices.device import Device, Devices
from blockd.devices.draining import Draining, InsertedFilter
from blockd.devices.stream_request import StreamRequest
from blockd.drivers.opening import NODE_NAME_LENGTH_MAX
from blockd.drivers.permissions import Claim
from blockd.errors import BlockdError, RequestError, StorageError
from blockd.filters.blkstream import BlkStream, CopyOnRead
from blockd.formats.add_cow.image import AddCowImage
from blockd.jobs.job import Job
from blockd.jobs.manager import JobManager, is_well_formed
from blockd.jobs.states import JobStatus
from blockd.jobs.stream import GUEST_LATENCY_S, StreamJob

log = logging.getLogger(__name__)

# How long the end of a stream waits for staged writes to be merged; longer, and the filter stays without it.
MERGE_WAIT_S = 1.0
# Who uses a filter that stays.
_STAYING = "staged writes"


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


@dataclass(kw_only=True, eq=False)
class Stream(InsertedFilter):
    """A stream under way. Its layers: from the active image down to, not including, the base."""

    job: StreamJob


class Streams:
    """Starts streams and knows which are running."""

    def __init__(self, devices: Devices, jobs: JobManager, guest_latency_s: float = GUEST_LATENCY_S) -> None:
        self._devices = devices
        self._jobs = jobs
        self._guest_latency_s = guest_latency_s
        self._running: dict[BlockNode, Stream] = {}
        self._draining = Draining(jobs.run_beside, self._remove_drained)
        # What was asked for, for as long as the job is there.
        self.requests: WeakKeyDictionary[Job, StreamRequest] = WeakKeyDictionary()

    def __iter__(self) -> Iterator[InsertedFilter]:
        """The streams whose end was not told yet, and the filters that streams have left behind."""
        found: dict[BlockNode, InsertedFilter] = {**self._running}
        found.update((inserted.front.active, inserted) for inserted in self._draining)
        return iter(found.values())

    @property
    def running(self) -> list[Stream]:
        """The streams whose end was not told yet."""
        return list(self._running.values())

    def draining_on(self, device: Device) -> InsertedFilter | None:
        """The filter in front of a device's active image that waits for staged writes to be merged."""
        return self._draining.get(device.active)

    def on(self, device: Device) -> Stream | None:
        """The stream into a device's active image, or into what that was before the stream was done."""
        return self._running.get(device.active)

    async def start(self, request: StreamRequest) -> Job:
        """Start a stream.

        The job runs on return; one that has nothing to do has already ended, unless it waits to be
        finalized, or for a client that paused it.

        Raises:   RequestError: the image cannot be written, `base` is not in its backing chain, or a part of
                  the chain is busy; nothing happened.
        """
        async with self._devices.change():
            job = await self.place(request)
            self._jobs.start(job)
        if isinstance(job, EmptyStream) and job.auto_finalize:
            await self._devices.changing.unless_hanging(job.wait_paused_or_ended)
        return job

    async def place(self, request: StreamRequest) -> Job:
        """Make the job of a stream and put its filter in place; to be started, or cleaned without that.

        Locks:    the caller holds `Devices.changing`.
        """
        self._devices.require_present(request.top)
        active = unfiltered(request.top)
        self.require_free_path(request.top, request.base)
        if request.base is not None:
            request = request._replace(base=unfiltered(request.base))
        layers = _layers(active, request.base)
        self._jobs.check_id(request.job_id)
        claims = _claims(layers, request.job_id)
        name = self._filter_name(request.filter_node_name, active)
        graph = self._devices.graph
        graph.require_liftable(active)
        graph.permissions.require(*claims, plan=graph.reopening(active, False))
        job: Job = EmptyStream(request, self._recording(active, request.backing_file))
        backing_file = request.backing_file
        if isinstance(active, OverlayNode) and (len(layers) > 1 or backing_file is not None):
            backing_file = await self._final_backing_file(active, request)
        if len(layers) > 1:
            assert isinstance(active, OverlayNode), "only an overlay has layers below"
            active.require_streamable()
            was_read_only = active.read_only
            async with self._devices.drained(active, is_bounded=True):
                await self._devices.graph.set_read_only(active, False)
                job = self._put_in_front(
                    active, name, request, layers, was_read_only=was_read_only, backing_file=backing_file
                )
        job.on_done = partial(self._forget, request.on_done)
        self.requests[job] = request
        return job

    async def _final_backing_file(self, active: OverlayNode, request: StreamRequest) -> str | None:
        """What the image is to record at the end; what cannot be is refused before anything is copied."""
        base, name = request.base, request.backing_file
        if name is None and base is not None:
            name = await in_thread(name_for, base, active)
        name = name or None
        await active.require_recordable(name, None if base is None else format_of(base))
        return name

    def _forget(self, on_done: Callable[[Job], None] | None, job: Job) -> None:
        """End the record of a stream, for who asks is told of it until its completion is."""
        self._running = {image: stream for image, stream in self._running.items() if stream.job is not job}
        if on_done is not None:
            on_done(job)

    def _put_in_front(
        self,
        active: OverlayNode,
        name: str,
        request: StreamRequest,
        layers: list[BlockNode],
        *,
        was_read_only: bool,
        backing_file: str | None,
    ) -> StreamJob:
        """Put a filter in front of the active image, to be taken away when the job ends.

        A filter that an earlier stream has left there, with what is staged in it, serves this one too.
        """
        base = request.base
        staying = self._draining.take(active)
        others: list[str] = []
        if staying is None:
            front: BlkStream = CopyOnRead(active, base, name)
        else:
            front = staying.front
            others = self._devices.graph.take_out(front, _STAYING)
            front.begin_again(base, name)
        job = StreamJob(
            request.job_id,
            front,
            base_filename=backing_file,
            base_format=None if base is None else format_of(base),
            guest_latency_s=self._guest_latency_s,
            **request.options._asdict(),
        )
        stream = Stream(
            job=job,
            front=front,
            layers=layers,
            was_read_only=was_read_only if staying is None else staying.was_read_only,
            first_backing_file=active.backing_filename,
            final_backing_file=backing_file,
            claims=_claims(layers, request.job_id),
            named=request.top,
            kept=None if staying is None else staying.kept,
        )
        job.clean = partial(self._take_away, stream)
        front.expect_staging(is_expected=True)
        self._devices.graph.insert(front, _user(job), *others)
        if staying is None:
            self._devices.put_in_front(active, front)
        self._devices.graph.permissions.claim(*stream.claims)
        self._running[active] = stream
        return job

    def _recording(self, active: BlockNode, filename: str | None) -> Callable[[], Awaitable[None]] | None:
        """What an empty stream does, if it does anything: record the name of the backing file."""
        if filename is None:
            return None
        assert isinstance(active, OverlayNode), "only an overlay has a backing file"

        async def record() -> None:
            async with self._devices.change_unasked():
                await self._devices.change_backing(active, filename or None)

        return record

    async def rebase(
        self, stream: Stream, base: BlockNode | None, undoing: AsyncExitStack, holding: AsyncExitStack
    ) -> None:
        """Have a stream end at `base`, which stands below its lowest layer by now.

        `undoing` takes that back; until `holding` ends, the image does not record it.

        Raises:   RequestError: the stream is about to end, copies the whole chain, or cannot record `base`.
        Fails to: the stream is as before.
        """
        job, before = stream.job, self.requests[stream.job]
        if stream.front.is_whole or not job.can_be_cancelled:
            raise RequestError(f"Node '{stream.layers[-1].node_name}' is busy: {_reason(stream)}")
        await holding.enter_async_context(job.keeps_unrecorded())
        request = before._replace(base=None, backing_file=None)
        if base is not None:
            request = before._replace(base=unfiltered(base))
        name = await self._final_backing_file(stream.front.active, request)
        undoing.callback(self._set_base, stream, before, stream.final_backing_file)
        self._set_base(stream, request, name)

    def _set_base(self, stream: Stream, request: StreamRequest, filename: str | None) -> None:
        self.requests[stream.job] = request
        stream.front.base, stream.final_backing_file = request.base, filename
        stream.job.set_base(filename, None if request.base is None else format_of(request.base))

    async def take_back(self, job: Job) -> None:
        """Undo `place` for a job that was not started.

        Locks:    the caller holds `Devices.changing`.
        """
        self.requests.pop(job, None)
        for stream in self.running:
            if stream.job is job:
                stream.front.expect_staging(is_expected=False)
                await self._let_stay_or_remove(stream)
                del self._running[stream.front.active]

    async def _take_away(self, stream: Stream) -> None:
        """Take the filter away; after a success also the layers that nobody needs any more.

        While something is staged that cannot be merged the filter stays, and the job has ended all the same.
        """
        stream.front.expect_staging(is_expected=False)
        if stream.front.staged_length or stream.kept is not None:
            merging = self._jobs.run_beside(self._merge(stream))
            await asyncio.wait([merging], timeout=MERGE_WAIT_S)

        async def take_away() -> None:
            await self._let_stay_or_remove(stream)
            await self._devices.graph.close_unused()

        await self._devices.change_once_drained(take_away)

    async def _merge(self, inserted: InsertedFilter) -> None:
        error = await inserted.try_merge()
        if error is not None:
            log.warning("%s: staged writes cannot be merged: %s", inserted.front.filename, error.message)

    async def _let_stay_or_remove(self, stream: Stream) -> None:
        """Let the filter stay if something is staged, else remove it.

        Locks:    the caller holds `Devices.changing`.
        """
        job, active, front = stream.job, stream.front.active, stream.front
        has_succeeded = job.status is not JobStatus.UNDEFINED and job.error is None and not job.is_cancelled
        if front.staged_length or (stream.kept is not None and not has_succeeded):
            assert not has_succeeded, "a stream succeeds when everything is in the image"
            self._let_stay(stream)
            return
        async with self._devices.drained(active, is_bounded=True):
            if has_succeeded:
                self._devices.graph.connect(active, "backing", stream.layers[-1].backing)
            await self._remove_front(stream)
            if has_succeeded:
                self._go_on_with_image(stream)

    def _let_stay(self, stream: Stream) -> None:
        """Have the filter stay in front of its image until nothing is staged in it."""
        graph, front = self._devices.graph, stream.front
        graph.permissions.release(*stream.claims)
        graph.add_user(front, _STAYING)
        graph.remove_user(front, _user(stream.job))
        self._draining.add(_staying(front, stream.was_read_only, stream.kept))

    async def _remove_drained(self, inserted: InsertedFilter) -> None:
        """Take away a filter in which nothing is staged any more."""

        async def remove() -> None:
            async with self._devices.drained(inserted.front.active, is_bounded=True):
                self._draining.forget(inserted)
                await self._remove_front(inserted)
            await self._devices.graph.close_unused()
            try:
                await self._devices.record()
            except StorageError as error:  # the next command tries again
                log.error("the journal may be out of date: %s", error.message)

        await self._devices.change_once_drained(remove)

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

    async def _remove_front(self, inserted: InsertedFilter) -> None:
        """Take a filter away, with what the copying has taken of the file and did not need.

        Locks:    the caller holds the drain.
        """
        await _trim(inserted.front.active)
        self._devices.take_from_front(inserted.front.active)
        self._devices.graph.permissions.release(*inserted.claims)
        self._devices.graph.take_out(inserted.front)
        if inserted.was_read_only:
            await self._make_read_only(inserted.front.active)

    async def _make_read_only(self, active: BlockNode) -> None:
        if self._devices.graph.permissions.is_written(active):
            return  # it became a disk of its own meanwhile
        try:
            await self._devices.graph.set_read_only(active, True)
        except BlockdError as error:
            log.error("node %s stays writable: %s", active.node_name, error.message)

    # -- what ended streams have left -----------------------------------------------------------

    async def stage_again(
        self, active: OverlayNode, pieces: Iterable[tuple[int, Buffer]], kept: object
    ) -> None:
        """Stage what an earlier run has kept for an image, in a filter that stays until it is merged.

        Raises:   RequestError, ImageError, StorageError: the image cannot be read, or not be written.
        Fails to: nothing is staged.
        """
        async with self._devices.change_unasked(), AsyncExitStack() as undo:
            was_read_only = active.read_only
            front = CopyOnRead(active, None, self._devices.graph.generate_name())
            undo.callback(front.drop_staged)
            await front.stage_again(pieces)
            if not front.staged_length:
                return
            async with self._devices.drained(active):
                await self._devices.graph.set_read_only(active, False)
                self._devices.graph.insert(front, _STAYING)
                self._devices.put_in_front(active, front)
            self._draining.add(_staying(front, was_read_only, kept))
            undo.pop_all()

    async def flush_staged(self, within_s: float) -> list[BlkStream]:
        """Merge what is staged as far as it can be in a time; returns the filters that have more."""
        merging = [self._jobs.run_beside(self._merge(inserted)) for inserted in self]
        if merging:
            await asyncio.wait(merging, timeout=within_s)
        return [inserted.front for inserted in self if inserted.front.staged_length]

    def staged_text(self, active: BlockNode) -> str:
        """Tell what is staged for an image whose stream has ended, and why."""
        staying = self._draining.get(active)
        return _staged_text(staying.front) if staying is not None else "0 bytes"

    def give_up_staged(self, active: BlockNode) -> None:
        """Lose what is staged for an image whose stream has ended."""
        staying = self._draining.get(active)
        if staying is not None and staying.front.staged_length:
            error = staying.front.staging_error
            why = "given up" if error is None else f"given up: {error.message}"
            self._devices.lose(active, staying.front.drop_staged(), why)
            self._draining.hurry(active)

    def _filter_name(self, wanted: str | None, active: BlockNode) -> str:
        graph, staying = self._devices.graph, self._draining.get(active)
        if staying is not None and wanted in (None, staying.front.node_name):
            return staying.front.node_name
        if wanted is None:
            return graph.generate_name()
        if not is_well_formed(wanted):
            raise RequestError(f"Could not create node: Invalid node-name: '{wanted}'")
        if len(wanted) > NODE_NAME_LENGTH_MAX:
            raise RequestError("Could not create node: Node name too long")
        if wanted in graph.nodes:
            raise RequestError(f"Could not create node: Duplicate nodes with node-name='{wanted}'")
        return wanted

    def is_filter_of_job(self, node: BlockNode) -> bool:
        """Whether a node is what a job has put in front of an image."""
        return any(node is inserted.front for inserted in self)

    def require_free_path(self, top: BlockNode, base: BlockNode | None) -> None:
        """Refuse a stream from `base` into `top` that would meet what another one has for itself."""
        path = list(takewhile(lambda node: node is not base, chain_with_filters(top)))
        self.require_free(path, but=self._draining.get(unfiltered(top)))

    def require_free(self, nodes: list[BlockNode], *, but: InsertedFilter | None = None) -> None:
        """Refuse nodes that another job has for itself, or for which writes are staged."""
        for node in nodes:
            for inserted in self:
                if inserted is not but and node in (inserted.front, inserted.named, *inserted.layers):
                    raise RequestError(f"Node '{node.node_name}' is busy: {_reason(inserted)}")


async def _trim(image: OverlayNode) -> None:
    try:
        await image.trim()
    except BlockdError as error:
        log.warning("'%s' takes more space than it needs: %s", image.filename, error.message)


def _user(job: Job) -> str:
    return f"job '{job.id}'"


def _staying(front: BlkStream, was_read_only: bool, kept: object) -> InsertedFilter:
    """A filter that stays for what is staged; what is below the image's backing may change."""
    active = front.active
    return InsertedFilter(
        front=front,
        layers=[active],
        was_read_only=was_read_only,
        first_backing_file=active.backing_filename,
        final_backing_file=active.backing_filename,
        kept=kept,
    )


def _reason(inserted: InsertedFilter) -> str:
    if isinstance(inserted, Stream):
        return f"block device is in use by block job: {inserted.job.type}"
    return f"guest writes are staged until they can be merged: {_staged_text(inserted.front)}"


def _staged_text(front: BlkStream) -> str:
    error = front.staging_error
    return f"{front.staged_length} bytes ({'the source is slow' if error is None else error.message})"


def _layers(active: BlockNode, base: BlockNode | None) -> list[BlockNode]:
    """The nodes from `active` down to, not including, `base`."""
    nodes = list(chain(active))
    if base is None:
        return nodes
    if base not in nodes[1:]:
        raise RequestError(f"Can't find '{base.filename}' in the backing chain")
    return nodes[: nodes.index(base)]


def _claims(layers: list[BlockNode], job_id: str) -> list[Claim]:
    """What a stream needs of the nodes that it keeps for itself: guests write to the first one only."""
    unchanging = CONSISTENT_READ | WRITE_UNCHANGED
    active, *rest = layers
    job = f"stream job '{job_id}'"
    return [
        *(Claim(node, Permission.NONE, unchanging, job, "intermediate node") for node in rest),
        Claim(active, Permission.NONE, unchanging | WRITE, job, "active node"),
        Claim(active, CONSISTENT_READ, unchanging | WRITE),
    ]
