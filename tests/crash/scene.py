"""A disk whose files are recorded together, and what guests and operators do to it.

Drawn: the base is all data, the middle has data, zeroes and gaps; the active image is empty. A stream
takes steps, of a copy each, when it is told to, so that anything can happen between two of them.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import cycle, islice
from typing import NamedTuple

from blockd.block.node import BlockNode, FillCounts, OverlayNode
from blockd.extents import Range
from blockd.filters.blkstream import BlkStream
from blockd.formats.raw.image import RawImage
from blockd.jobs import stream as stream_module
from blockd.jobs.states import JobStatus
from blockd.jobs.stream import StreamJob
from tests.cold_file import coldness, hold_few_tables
from tests.guest import Guest, RootDisk
from tests.inline_threads import steps, use_inline_threads
from tests.model import AfterCrash, ModelDisk, drawn
from tests.recording import Disks, RecordingFile, Tape
from tests.scheduled_threads import RandomThreads, scheduled
from tests.streaming import Streaming, create, open_overlay, overlay, streaming

BASE, MIDDLE = "base.raw", "middle.qcow2"
# What a stream copies at a time, and how much it copies between two checkpoints, in clusters.
STEP_CLUSTER_COUNT, CHECKPOINT_CLUSTER_COUNT = 2, 4
# How often files say that they would wait: never, at random, always.
COLD_SHARES = {"warm": 0, "cold": 0.7, "all cold": 1}
# After this many turns of the event loop nothing moves any more but what waits at a gate.
SETTLED_STEP_COUNT = 30


class Gate:
    """Lets copies of a stream through, one for each ticket, or all of them."""

    def __init__(self) -> None:
        self._tickets = asyncio.Semaphore(0)
        self.is_open = False

    async def wait(self) -> None:
        if not self.is_open:
            await self._tickets.acquire()

    def let_through(self) -> None:
        self._tickets.release()

    def open(self) -> None:
        self.is_open = True
        for _ in range(stream_module.COPY_COUNT):
            self._tickets.release()


class GatedStream(BlkStream):
    """The filter of a stream whose copies wait at a gate."""

    gate: Gate

    async def populate(self, ranges: Sequence[Range], *, keep_cached: bool = False) -> FillCounts:
        if not keep_cached:  # a copy of the job, not one for a guest's read
            await self.gate.wait()
        return await super().populate(ranges, keep_cached=keep_cached)


class Since(NamedTuple):
    """What holds from a position on the tape on: which file the device is on, which backings are recorded."""

    position: int
    tops: tuple[int, ...]
    backing_names: frozenset[str | None]


def unwrapped(source: BlockNode) -> BlockNode:
    """Put nothing between an image and its backing."""
    return source


class Scene:
    """The disk; `moments` tell what a crash may leave, by position on the tape."""

    def __init__(
        self,
        cluster_size: int,
        cluster_count: int,
        *,
        image_format: str = "qcow2",
        options: Mapping[str, object] | None = None,
        base_name: str | None = None,
        file_type: type[RecordingFile] = RecordingFile,
        is_slow: bool = False,
        cold_share: float = 0,
        prepare: Callable[[bytes], bytes] = bytes,
        hidden_count: int = 0,
        wrap_source: Callable[[BlockNode], BlockNode] = unwrapped,
        seed: int = 0,
    ) -> None:
        self.cluster_size = cluster_size
        self.cluster_count = cluster_count
        # Of the active images; the backings are of others. `cluster_size` is what is allocated at a time.
        self.image_format = image_format
        self._options = options or {}
        # So many clusters of the backing lie behind the end of the active image at first.
        self._hidden_count = hidden_count
        self.base_name = base_name
        self.tape: Tape = []
        # The files of the active images, each with the one beside it if it has one.
        self.files: list[RecordingFile] = []
        self.part_count = 2 if image_format == "add-cow" else 1
        self.moments: list[tuple[int, AfterCrash]] = []
        self.history: list[Since] = []
        # Former active images, which never change again: from which position on, which file, its content.
        self.frozen: list[tuple[int, int, bytes]] = []
        self.backings: dict[str | None, RecordingFile] = {}
        self.nodes: dict[str | None, BlockNode | None] = {None: None}
        self.streaming: Streaming
        self.guest: Guest
        self.model: ModelDisk
        self.job: StreamJob | None = None
        self._gate = Gate()
        self._file_type = file_type
        self._is_slow = is_slow
        # So many answers at once are refused; then threads finish in any order, and caches hold two tables.
        self._cold_share = cold_share
        # Changes the first image before anything happens to it.
        self._prepare = prepare
        # Puts something between the first image and its backing.
        self._wrap_source = wrap_source
        self._rng = random.Random(seed)

    # -- building ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Scene"]:
        """Build everything and record from then on; at the end the power is cut."""
        use_inline_threads()
        threads = scheduled(RandomThreads(self._rng)) if self._cold_share else contextlib.nullcontext()
        with threads:
            async with self._running():
                yield self

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        await self._build_backings()
        self.model.cut(self.model.size - self._hidden_count * self.cluster_size)
        file = await self._new_overlay(MIDDLE, "qcow2", self.model.size)
        active = await self._open(file, self.nodes[MIDDLE])
        async with streaming(active) as self.streaming:
            self.streaming.filter_type = GatedStream
            disk = RootDisk(self.streaming.root)
            self.guest = Guest(disk, self.model, self._rng, cluster_size=self.cluster_size)
            self._since({MIDDLE})
            self.note_moment()
            self.model.on_change = self.note_moment
            with small_pieces(self.cluster_size):
                yield
            self.model.on_change = lambda: None
            for recorded in self.files:
                recorded.tape = []
            self._gate.open()

    async def _build_backings(self) -> None:
        count = self.cluster_count
        pattern = "".join(islice(cycle("C0-D--E-"), count))
        content = drawn(["B" * count], self.cluster_size)
        self.backings[BASE] = RecordingFile(content, BASE)
        self.nodes[BASE] = await RawImage.open(self.backings[BASE], node_name="base", read_only=True)
        middle_file = self.backings[MIDDLE] = RecordingFile(name=MIDDLE)
        middle = await overlay(middle_file, self.nodes[BASE], len(content), cluster_size=self.cluster_size)
        self.model = ModelDisk(drawn(["B" * count, pattern], self.cluster_size))
        for index, kind in enumerate(pattern):
            if kind != "-":
                await middle.write(*self._drawn_cluster(index))
        await middle.flush()
        self.nodes[MIDDLE] = self._wrap_source(
            await open_overlay(middle_file, self.nodes[BASE], read_only=True)
        )

    def _drawn_cluster(self, index: int) -> tuple[int, bytes]:
        start = index * self.cluster_size
        return start, bytes(self.model.content[start : start + self.cluster_size])

    async def _new_overlay(self, backing_name: str, backing_format: str, size: int) -> RecordingFile:
        name = f"active{self.image_count}"
        made = RecordingFile(name=f"{name}.{self.image_format}")
        if self.part_count > 1:
            made.beside = RecordingFile(name=f"{name}.data")
        await create(
            made,
            size,
            self.image_format,
            backing_filename=backing_name,
            backing_format=backing_format,
            **{"cluster_size": self.cluster_size, **self._options},
        )
        content = bytes(made.disk) if self.files else self._prepare(bytes(made.disk))
        file = self._recorded(content, made.filename)
        if made.beside is not None:
            file.beside = self._recorded(bytes(made.beside.disk), made.beside.filename)
        return file

    async def _open(self, file: RecordingFile, backing: BlockNode | None) -> OverlayNode:
        image = await open_overlay(file, backing)
        if self._cold_share:
            hold_few_tables(image)
        return image

    def _recorded(self, content: bytes, name: str) -> RecordingFile:
        file = self._file_type(content, name)
        file.is_slow = self._is_slow
        if self._cold_share:
            file.would_wait = coldness(self._rng, self._cold_share)
        file.tape = self.tape
        file.on_entry = self.note_moment
        self.files.append(file)
        return file

    @property
    def image_count(self) -> int:
        """How many images have been active."""
        return len(self.files) // self.part_count

    def file_after_crash(self, disks: Disks, index: int) -> RecordingFile:
        """The file of an image as a crash has left it."""
        first = index * self.part_count
        parts = [
            RecordingFile(disks[number], self.files[number].filename)
            for number in range(first, first + self.part_count)
        ]
        if self.part_count > 1:
            parts[0].beside = parts[1]
        return parts[0]

    # -- keeping the books ------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """How many entries the tape has."""
        return len(self.tape)

    def note_moment(self) -> None:
        """Remember what a crash may leave now, if that is new."""
        now = self.model.after_crash()
        if not self.moments or self.moments[-1][1] is not now:
            self.moments.append((self.position, now))

    def _since(self, backing_names: set[str | None], *, tops: tuple[int, ...] | None = None) -> None:
        top = self.image_count - 1
        self.history.append(Since(self.position, tops or (top,), frozenset(backing_names)))

    @property
    def has_leaks(self) -> bool:
        """Whether clusters were taken for nobody when the image was made."""
        return self._prepare is not bytes

    @property
    def is_streaming(self) -> bool:
        return self.job is not None

    # -- guests -----------------------------------------------------------------------------------

    async def write(self, first: float, count: float = 1) -> None:
        """Write `count` clusters from cluster `first` on; parts of clusters are fine."""
        await self._settle(first, count)
        await self.guest.write(*self._range(first, count))

    async def zero(self, first: float, count: float = 1) -> None:
        await self._settle(first, count)
        await self.guest.zero(*self._range(first, count))

    async def discard(self, first: float, count: float = 1) -> None:
        await self._settle(first, count)
        await self.guest.discard(*self._range(first, count))

    async def read(self, first: float, count: float = 1) -> None:
        """Read with copy-on-read, by the filter of a stream or one of its own."""
        if self.is_streaming:
            await self.guest.read(*self._range(first, count))
            return
        root = self.streaming.root
        async with root.drained():
            root.replace(BlkStream(self.streaming.active, self.nodes[self.base_name], "#copy-on-read"))
        await self.guest.read(*self._range(first, count))
        async with root.drained():
            root.replace(self.streaming.active)

    async def flush(self) -> None:
        await self.guest.flush()

    async def _settle(self, first: float, count: float) -> None:
        """Look what a discard left there before a part changes; past the filter: nothing is to be copied."""
        offset, length = self._range(first, count)
        if self.model.is_unsettled(offset, length):
            await self.streaming.root.top.catch_up()
            self.model.check_read(offset, bytes(await self.streaming.active.read(offset, length)))

    def _range(self, first: float, count: float) -> tuple[int, int]:
        return int(first * self.cluster_size), int(count * self.cluster_size)

    # -- streams ----------------------------------------------------------------------------------

    @property
    def can_stream(self) -> bool:
        """Whether there is anything to stream from, above the base."""
        return self.streaming.active.backing is not self.nodes[self.base_name]

    async def stream_step(self) -> None:
        """Let the stream copy one piece; start one if none is running."""
        job = self.job or await self._start_stream()
        self._gate.let_through()
        await self._settled()
        await self._note_end(job)

    async def complete(self) -> None:
        """Let the stream run to its end; start one if none is running."""
        job = self.job or await self._start_stream()
        self._gate.open()
        await job.wait_ended()
        await self._note_end(job)

    async def cancel(self) -> None:
        assert self.job is not None
        if self.job.can_be_cancelled:
            self.job.cancel()
        await self.job.wait_ended()
        await self._note_end(self.job)

    async def _start_stream(self) -> StreamJob:
        """Start a stream and let it come to its gate."""
        self._gate = GatedStream.gate = Gate()
        self._since({self.streaming.active.backing_filename, self.base_name})
        self.job = await self.streaming.start(self.nodes[self.base_name])
        await self._settled()
        return self.job

    async def _settled(self) -> None:
        """Return when nothing moves any more; threads that are drawn take longer, so some may."""
        await steps(SETTLED_STEP_COUNT)

    async def look(self) -> None:
        """Notice a stream that has ended meanwhile."""
        if self.job is not None:
            await self._note_end(self.job)

    async def _note_end(self, job: StreamJob) -> None:
        if job.status is JobStatus.NULL:
            await job.wait_ended()
            assert job.error is None, job.error
            self.job = None
            self._since({self.streaming.active.backing_filename})

    # -- operators --------------------------------------------------------------------------------

    async def close(self) -> None:
        """Stop as a daemon does, and start again."""
        if self.is_streaming:
            await self.cancel()
        old = self.streaming.active
        durable = self.model.begin_flush()
        await old.close()
        self.model.finish_flush(durable)
        self.streaming.active = await self._open(self.files[-self.part_count], old.backing)
        self.streaming.root.replace(self.streaming.active)

    async def resize(self, cluster_count: int) -> None:
        self.model.begin_resize(cluster_count * self.cluster_size)
        async with self.streaming.root.request() as node:
            await node.resize(cluster_count * self.cluster_size)
        self.model.finish_resize()

    async def grow(self, cluster_count: int) -> None:
        await self.resize(self.model.size // self.cluster_size + cluster_count)

    async def rename_backing(self, name: str) -> None:
        """Record another name for the same backing file."""
        active = self.streaming.active
        self._since({active.backing_filename, name})
        self.nodes[name] = active.backing
        await active.change_backing(name, "qcow2")
        self._since({name})

    async def detach(self) -> None:
        """Copy everything as a guest's reads do, and let go of the backing without flushing before."""
        await self.read(0, self.model.size // self.cluster_size)
        active = self.streaming.active
        self._since({active.backing_filename, None})
        await active.change_backing(None, None)
        active.backing = None
        self._since({None})

    async def switch(self) -> None:
        """Go on in a new overlay."""
        old = self.streaming.active
        index = self.image_count - 1
        file = await self._new_overlay(old.filename, self.image_format, old.size)
        fresh = await self._open(file, None)
        names = {old.backing_filename, old.filename}
        self._since(names, tops=(index, index + 1))
        self.nodes[old.filename] = old
        durable = self.model.begin_flush()
        await self.streaming.switch(fresh)
        self.model.finish_flush(durable)
        self._since({old.filename})
        self.frozen.append((self.position, index, bytes(await old.read(0, old.size))))


@contextmanager
def small_pieces(cluster_size: int) -> Iterator[None]:
    """Let streams copy small disks in several steps, with checkpoints between."""
    sizes = {
        "COPY_LENGTH": STEP_CLUSTER_COUNT * cluster_size,
        "WINDOW_LENGTH": CHECKPOINT_CLUSTER_COUNT * cluster_size,
        "CHECKPOINT_LENGTH": CHECKPOINT_CLUSTER_COUNT * cluster_size,
        "COPY_COUNT": 1,
    }
    before = {name: getattr(stream_module, name) for name in sizes}
    for name, value in sizes.items():
        setattr(stream_module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(stream_module, name, value)
