"""What a stream makes of a copy that fails in one place: everything around it is copied."""

import asyncio
from collections.abc import Sequence

import pytest

from blockd.block.node import FillCounts
from blockd.errors import StorageError
from blockd.extents import Extent, Kind, Range
from blockd.jobs.job import Job, JobObserver, OnError
from blockd.jobs.narrowing import CHUNK_LENGTH, narrow
from blockd.jobs.stream import StreamJob
from blockd.units import KIB, MIB
from tests.stream.test_stream_job import ForgetfulDisk

CLUSTER = 64 * KIB


class BadDisk(ForgetfulDisk):
    """A disk of which nothing is copied yet, and some clusters cannot be."""

    def __init__(self, size: int, bad: set[int]) -> None:
        super().__init__(0)
        self.size = size
        self.bad = bad
        self.copied: set[int] = set()
        self.guest_waits = self

    def clusters(self, start: int, end: int) -> set[int]:
        return set(range(start, end, CLUSTER))

    async def missing(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, Kind.DATA)]

    async def populate(self, ranges: Sequence[Range]) -> FillCounts:
        wanted = set().union(*(self.clusters(start, end) for start, end in ranges))
        await asyncio.sleep(0)
        if wanted & self.bad:
            raise StorageError("Could not read 'base.raw': Input/output error", operation="read")
        self.copied |= wanted
        return FillCounts(len(wanted) * CLUSTER, 0, 0)

    async def run_staging(self) -> None:
        await asyncio.Event().wait()

    async def flush(self) -> None:
        pass

    def take(self) -> float | None:
        return None

    async def copy(self, piece: Extent) -> None:
        await self.populate([(piece.offset, piece.end)])


class Listener(JobObserver):
    """Counts errors, and knows how far the job was at each."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def status_changed(self, job: Job) -> None: ...

    def error_met(self, job: Job, operation: str, action: str) -> None:
        self.offsets.append(job.offset)

    def pending(self, job: Job) -> None: ...

    def ended(self, job: Job) -> None: ...


async def run(disk: BadDisk, on_error: OnError) -> tuple[StreamJob, Listener]:
    job = StreamJob("j", disk, base_filename=None, base_format=None, on_error=on_error)  # type: ignore[arg-type]
    listener = Listener()

    async def record(_: Job, tell: object) -> None:
        assert callable(tell)
        tell()

    job.create(listener, record)
    job.begin()
    await job.supervise()
    return job, listener


@pytest.mark.parametrize("bad", [0, 3 * MIB + 5 * CLUSTER, 48 * MIB - CLUSTER])
async def test_one_bad_cluster_costs_one_cluster(bad: int) -> None:
    disk = BadDisk(48 * MIB, {bad})
    job, listener = await run(disk, OnError.IGNORE)
    assert disk.copied == disk.clusters(0, disk.size) - {bad}
    assert len(listener.offsets) == 1
    assert (job.offset, job.error_text) == (disk.size, "Input/output error")


async def test_everything_before_the_bad_place_is_copied_and_told() -> None:
    disk = BadDisk(48 * MIB, {9 * MIB + 3 * CLUSTER})
    job, listener = await run(disk, OnError.REPORT)
    assert disk.clusters(0, 9 * MIB + 3 * CLUSTER) <= disk.copied
    assert (listener.offsets, job.offset) == ([9 * MIB], 9 * MIB), "a chunk is told by where it begins"
    assert job.error_detail == "Could not read 'base.raw': Input/output error"


async def test_each_bad_chunk_is_one_error() -> None:
    """As with QEMU, whose chunks are as long."""
    disk = BadDisk(48 * MIB, {MIB, MIB + CLUSTER, MIB + CHUNK_LENGTH, 30 * MIB})
    _, listener = await run(disk, OnError.IGNORE)
    assert len(listener.offsets) == 3
    assert disk.copied == disk.clusters(0, disk.size) - disk.bad


async def test_narrowing_stops_at_the_first_bad_cluster_and_hands_back_the_rest() -> None:
    disk = BadDisk(4 * MIB, {MIB + CLUSTER, 2 * MIB})
    [failure] = await narrow(
        disk.copy, [Extent(0, 4 * MIB, Kind.DATA)], CLUSTER, StorageError("x"), finds_all=False
    )
    assert failure.offset == MIB
    assert set().union(
        *(disk.clusters(piece.offset, piece.end) for piece in failure.pieces)
    ) == disk.clusters(MIB + CLUSTER, 4 * MIB)
    assert disk.copied == disk.clusters(0, MIB + CLUSTER)


async def test_a_chunk_that_failed_once_is_a_failure_of_which_nothing_is_left() -> None:
    disk = BadDisk(4 * MIB, set())
    chunk = Extent(MIB, CHUNK_LENGTH, Kind.DATA)
    [failure] = await narrow(disk.copy, [chunk], CLUSTER, StorageError("x"), finds_all=False)
    assert (failure.offset, failure.pieces) == (MIB, [])
