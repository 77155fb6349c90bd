"""The stream job: populate from 0 to the end, then write the final base.

The loop takes a window of missing ranges at a time and copies a few of them at once, as many as guests leave
room for (leeway.py); it comes back to its top, where pause, rate and cancel are looked at, with no copy
pending, and early if one of them changed. Checkpoints run beside the copying. What happens to the graph
around it is the device's business (`clean`).
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

from blockd.aio import task_group
from blockd.block.node import FillCounts, OverlayNode
from blockd.errors import StorageError
from blockd.extents import Extent, Kind, Range
from blockd.jobs.job import Action, Job, OnError
from blockd.jobs.leeway import Leeway
from blockd.jobs.narrowing import CHUNK_LENGTH, Failure, narrow
from blockd.jobs.pace import Pace
from blockd.units import GIB, MIB, align_down

log = logging.getLogger(__name__)

# What one copy takes, how many run at once, both at most, and how much one round of the loop takes. Half of
# the copies prepare while the disk has the others; at the end of a round it has nothing to do.
COPY_LENGTH = 4 * MIB
COPY_COUNT = 6
# Where copies are made in another process, one after another, they are longer by this, so that the event loop
# has fewer of them to see to, and half as many wait.
APART_FACTOR = 4
# How many copies of all streams together run at once, beyond one of each.
COPY_COUNT_ALL = 8
WINDOW_LENGTH = 512 * MIB
# How many pieces one copy takes, and how far they may be spread, in times of what it may copy.
PIECE_COUNT_MAX = 512
SPREAD_FACTOR = 4
# How many maps one round looks at: a sparse terabyte is walked without holding others up.
SCAN_COUNT = 64
# With a speed limit, a round copies what the limit allows in this time.
RATE_SLICE_S = 0.1
# How many times the last step looks for what is still missing, and copies it: more than guests whose writes
# fail can make necessary, unless all of them do.
REST_COUNT_MAX = 16
# After a crash at most this much is copied again.
CHECKPOINT_LENGTH = 8 * GIB
CHECKPOINT_INTERVAL_S = 5.0
# How long the guests' requests may take before a stream holds back, unless it is told otherwise.
GUEST_LATENCY_S = 0.005
# How often it is looked whether the loop keeps guests waiting, and how often the leeway adapts to that.
TICK_S = 0.01
LEEWAY_INTERVAL_S = 0.05


class GuestWaits(Protocol):
    """What the job needs to know of the guests."""

    def take(self) -> float | None: ...


class StreamTarget(Protocol):
    """What the job needs of the `blkstream` filter."""

    active: OverlayNode
    size: int
    guest_written: int

    @property
    def copies_in_order(self) -> bool: ...

    @property
    def guest_waits(self) -> GuestWaits: ...

    async def missing(self, offset: int, length: int) -> list[Extent]: ...

    async def populate(self, ranges: Sequence[Range]) -> FillCounts: ...

    async def run_staging(self) -> None: ...

    async def flush(self) -> None: ...


@dataclass
class Counters:
    """What a stream did so far, in bytes."""

    copied: int = 0
    zero: int = 0
    skipped: int = 0
    dropped: int = 0  # the guest wrote them while they were being copied


@dataclass
class _Round:
    """Pieces that are being copied, from the left on; those `under_way` and behind are not done yet."""

    tasks: asyncio.TaskGroup
    pieces: deque[Extent]
    speed: int
    copier_count: int = 0
    # What is copied together.
    under_way: list[list[Extent]] = field(default_factory=list)
    # They end the round: what is under way is finished, and the policy is asked.
    failures: list[Failure] = field(default_factory=list)


class StreamJob(Job):
    """Streams into the active image of `target`, then records the backing file `base_filename`."""

    type = "stream"
    # How many streams copy now.
    copying_count: ClassVar[int] = 0

    def __init__(
        self,
        job_id: str,
        target: StreamTarget,
        *,
        base_filename: str | None,
        base_format: str | None,
        speed: int = 0,
        on_error: OnError = OnError.REPORT,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        guest_latency_s: float = GUEST_LATENCY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            job_id,
            length=target.size,
            speed=speed,
            on_error=on_error,
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
            clock=clock,
        )
        self.counters = Counters()
        self.leeway = Leeway(COPY_LENGTH, COPY_COUNT, guest_latency_s)
        self._pace = Pace(COPY_LENGTH)
        self._target = target
        self._copies_in_order = target.copies_in_order  # looked at once a round: it asks all nodes below
        self._base_filename = base_filename
        self._base_format = base_format
        # Held by who changes these two, once or several times, and while they are recorded.
        self._recording = asyncio.Lock()
        self._keeping_count = 0
        self._clock = clock
        self._started = clock()
        self._checkpoint_at = CHECKPOINT_LENGTH
        self._checkpoint_asked = asyncio.Event()
        self._is_copying = asyncio.Event()

    @property
    def guest_written(self) -> int:
        """Bytes that the guest wrote since the job started."""
        return self._target.guest_written

    @property
    def rate(self) -> float:
        """Bytes copied per second, over the job's life."""
        elapsed = self._clock() - self._started
        return self.counters.copied / elapsed if elapsed > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """How long the rest will take at the pace so far; None at first, and while nothing happens."""
        if not self.offset or self.is_user_paused:
            return None
        return (self._clock() - self._started) / self.offset * (self.length - self.offset)

    # -- the work -----------------------------------------------------------------------------

    async def run(self) -> None:
        async with task_group() as tasks:
            beside = [
                tasks.create_task(self._make_checkpoints()),
                tasks.create_task(self._target.run_staging()),
                tasks.create_task(self._adapt_leeway()),
            ]
            try:
                await self._stream()
            finally:
                for task in beside:
                    task.cancel()
        await self._flush()

    async def commit(self) -> None:
        await self._copy_rest()
        async with self._recording:
            await self._target.active.change_backing(self._base_filename, self._base_format)

    def set_base(self, filename: str | None, backing_format: str | None) -> None:
        """Have another backing file recorded at the end."""
        self._base_filename, self._base_format = filename, backing_format

    @asynccontextmanager
    async def keeps_unrecorded(self) -> AsyncIterator[None]:
        """Keep the job from recording its backing file, while that is being changed.

        May be entered again inside, by the same user: there is one at a time.
        """
        if not self._keeping_count:
            await self._recording.acquire()
        self._keeping_count += 1
        try:
            yield
        finally:
            self._keeping_count -= 1
            if not self._keeping_count:
                self._recording.release()

    async def _flush(self) -> None:
        """Bring all copies to the disk while the policy can still act on errors: the rest is the header."""
        action = Action.STOP
        while action is Action.STOP:
            try:
                await self._target.flush()
                return
            except StorageError as error:
                action = await self.handle_error(error, error.operation)
                if action is Action.REPORT:
                    raise

    async def _copy_rest(self) -> None:
        """Go over the whole map until nothing is missing.

        A guest write may have cancelled a copy and then failed itself.

        Raises:   StorageError: something is missing however often it is copied.
        """
        for _ in range(REST_COUNT_MAX):
            first = await self._copy_missing()
            if first is None:
                return
        filename = self._target.active.filename
        raise StorageError(
            f"'{filename}' still lacks data at {first} after it was copied {REST_COUNT_MAX} times"
        )

    async def _copy_missing(self) -> int | None:
        """Copy what is missing anywhere; tells where it began, None if nothing was."""
        offset, first = 0, None
        while offset < self.length:
            needed, offset = await self._scan(offset)
            left = deque(needed)
            while left:
                first = left[0].offset if first is None else first
                self._count(await self._target.populate(_ranges(self._take(left))))
        return first

    async def _stream(self) -> None:
        offset = copied_before = 0
        while offset < self.length:
            await self.pause_point(self.counters.copied - copied_before)
            copied_before = self.counters.copied
            try:
                needed, end = await self._scan(offset)
            except StorageError as error:
                # Without a map nothing can be left out, so there is nothing to ignore.
                if await self.handle_error(error, error.operation) is Action.STOP:
                    continue
                raise
            left = deque(needed)
            await self._copy(left)
            if left:
                end = min(piece.offset for piece in left)
                needed = [piece for piece in needed if piece.offset < end]
            copied = sum(piece.length for piece in needed)
            if needed and needed[-1].end > end:
                copied -= needed[-1].end - end
            self.counters.skipped += end - offset - copied
            offset = end
            self.set_progress(offset, self.length)
            self._ask_for_checkpoint()

    async def _scan(self, offset: int) -> tuple[list[Extent], int]:
        """The next pieces to copy, from `offset` on, and up to where the map was looked at."""
        pieces: list[Extent] = []
        piece_length, budget = self._amounts()
        for _ in range(SCAN_COUNT):
            for extent in await self._target.missing(offset, self.length - offset):
                offset = extent.end
                if extent.kind is not Kind.DATA:
                    continue
                if extent.length <= piece_length and extent.length < budget:  # as the many small ones are
                    pieces.append(extent)
                    budget -= extent.length
                    continue
                end = min(extent.end, extent.offset + budget)
                for start in range(extent.offset, end, piece_length):
                    pieces.append(Extent(start, min(piece_length, end - start), Kind.DATA))
                budget -= end - extent.offset
                if budget <= 0:
                    return pieces, end
            if offset >= self.length:
                break
            await asyncio.sleep(0)  # what is in memory needs no waiting; guests have their turn
        return pieces, offset

    def _amounts(self) -> tuple[int, int]:
        """How much to copy in one piece and in one round: no more than the rate allows in a slice."""
        cluster_size = self._target.active.cluster_size
        if not self.speed:
            return max(APART_FACTOR * COPY_LENGTH, cluster_size), WINDOW_LENGTH
        allowed = max(cluster_size, align_down(int(self.speed * RATE_SLICE_S), cluster_size))
        return min(COPY_LENGTH, allowed), min(WINDOW_LENGTH, allowed)

    async def _copy(self, pieces: deque[Extent]) -> None:
        """Copy pieces, a few at once, from the left on; what a pause or another speed leaves undone stays.

        Those that failed are retried after the pause the policy asks for.
        """
        while True:
            self._is_copying.set()
            self._copies_in_order = self._target.copies_in_order
            StreamJob.copying_count += 1
            try:
                async with task_group() as tasks:
                    copying = _Round(tasks, pieces, self.speed)
                    self._start_copiers(copying)
            finally:
                StreamJob.copying_count -= 1
                self._is_copying.clear()
            if not copying.failures:
                return
            self._tell_progress(copying)
            pieces.extendleft(reversed(await self._apply_policy(copying.failures)))

    def _start_copiers(self, copying: "_Round") -> None:
        """Copy as many pieces at once as may be now."""
        while copying.copier_count < min(self._copy_count(), copying.copier_count + len(copying.pieces)):
            copying.copier_count += 1
            copying.tasks.create_task(self._copy_some(copying))

    async def _copy_some(self, copying: "_Round") -> None:
        """Copy one piece after another, as long as there may be so many copiers."""
        pieces = copying.pieces
        while pieces and not copying.failures and not self.is_user_paused and self.speed == copying.speed:
            taken = self._take(pieces)
            copying.under_way.append(taken)
            began = self._clock()
            try:
                self._count(await self._target.populate(_ranges(taken)))
            except StorageError as error:
                await self._fail(copying, taken, error)
            else:
                self._pace.note(sum(piece.length for piece in taken), self._clock() - began)
                copying.under_way.remove(taken)
            self._tell_progress(copying, taken[-1].end)
            await asyncio.sleep(0)  # guests have their turn before the next copy is prepared
            if copying.copier_count > self._copy_count():
                break
            self._start_copiers(copying)
        copying.copier_count -= 1

    async def _fail(self, copying: "_Round", taken: list[Extent], error: StorageError) -> None:
        """Find where a copy fails; what is ignored counts as done, anything else ends the round there."""
        is_ignored = self._action_for(error) is Action.IGNORE
        cluster_size = self._target.active.cluster_size
        failures = await narrow(self._populate, taken, cluster_size, error, finds_all=is_ignored)
        if is_ignored:
            copying.under_way.remove(taken)
            for failure in failures:
                await self.handle_error(failure.error, failure.error.operation)
        else:
            copying.failures += failures
            copying.under_way[copying.under_way.index(taken)] = [Extent(failures[0].offset, 1, Kind.DATA)]

    async def _populate(self, piece: Extent) -> None:
        self._count(await self._target.populate(_ranges([piece])))

    def _tell_progress(self, copying: "_Round", end: int = 0) -> None:
        """All before what is under way is done; without any, all up to an end."""
        self.set_progress(copying.under_way[0][0].offset if copying.under_way else end, self.length)

    def _copy_count(self) -> int:
        """How many copies of this stream may run now: what there is leeway for, and others leave to it."""
        if self._copies_in_order:
            return 1
        count = self.leeway.copy_count
        if self._target.active.copies_apart:
            count = max(1, count // 2)
        return min(count, max(1, COPY_COUNT_ALL // StreamJob.copying_count))

    def _take(self, pieces: deque[Extent]) -> list[Extent]:
        """Take the first pieces, as much as there is leeway for and a copy does in a moment.

        Many small ones are copied together if they are not far from each other.
        """
        length = self._copy_length()
        taken = [self._take_piece(pieces, length)]
        start, left = taken[0].offset, length - taken[0].length
        while pieces and len(taken) < PIECE_COUNT_MAX:
            if left < pieces[0].length or pieces[0].end - start > SPREAD_FACTOR * length:
                break
            taken.append(pieces.popleft())
            left -= taken[-1].length
        return taken

    def _take_piece(self, pieces: deque[Extent], length: int) -> Extent:
        """Take the first piece, or as much of it as a copy may take."""
        piece = pieces.popleft()
        if piece.length <= length:
            return piece
        pieces.appendleft(Extent(piece.offset + length, piece.length - length, Kind.DATA))
        return Extent(piece.offset, length, Kind.DATA)

    def _copy_length(self) -> int:
        """How much there is leeway for, and is copied in a moment."""
        cluster_size = self._target.active.cluster_size
        length = min(self.leeway.copy_length, self._pace.length)
        if self._copies_in_order:
            length = CHUNK_LENGTH
        elif self._target.active.copies_apart:
            length *= APART_FACTOR
        return max(cluster_size, align_down(length, cluster_size))

    async def _apply_policy(self, failures: list[Failure]) -> list[Extent]:
        """Act on the first failure; tells which pieces to try again then, in order of their offsets."""
        first = min(failures, key=lambda failure: failure.offset)
        if await self.handle_error(first.error, first.error.operation) is Action.REPORT:
            raise first.error
        again = (piece for failure in failures for piece in failure.pieces)
        return sorted(again, key=lambda piece: piece.offset)

    async def _adapt_leeway(self) -> None:
        """Have the leeway follow what guests wait, as long as there are copies that could be the reason.

        A guest waits for the image (`guest_waits`), or for the loop: for requests that are answered at once
        the loop has to come round.
        """
        while True:
            await self._is_copying.wait()
            began, lag_s, tick_count = self._clock(), 0.0, 0
            # However long this process itself has had to wait meanwhile.
            while (now := self._clock()) < began + LEEWAY_INTERVAL_S or not tick_count:
                await asyncio.sleep(TICK_S)
                lag_s += max(0.0, self._clock() - now - TICK_S)
                tick_count += 1
            waited_s = self._target.guest_waits.take()
            self.leeway.adapt(None if waited_s is None else max(waited_s, lag_s / tick_count))

    def _count(self, counts: FillCounts) -> None:
        self.counters.copied += counts.copied
        self.counters.zero += counts.zeroed
        self.counters.dropped += counts.dropped

    # -- checkpoints --------------------------------------------------------------------------

    def _ask_for_checkpoint(self) -> None:
        if self.counters.copied >= self._checkpoint_at:
            self._checkpoint_at = self.counters.copied + CHECKPOINT_LENGTH
            self._checkpoint_asked.set()

    async def _make_checkpoints(self) -> None:
        """Make what was copied durable beside the copying, so that a crash repeats little of it.

        Also of a job that is paused or slow: what it copied last is durable soon after.
        """
        durable = Counters()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECKPOINT_INTERVAL_S):
                    await self._checkpoint_asked.wait()
            self._checkpoint_asked.clear()
            if self.counters == durable:
                continue
            copied = replace(self.counters)
            try:
                # Of the image alone: what the filter has staged may have to wait for the source.
                await self._target.active.flush()
                durable = copied
            except StorageError as error:
                # The job's last step meets the same error and fails with it.
                log.warning("job %s: checkpoint failed: %s", self.id, error.message)


def _ranges(pieces: list[Extent]) -> list[Range]:
    return [(piece.offset, piece.end) for piece in pieces]
