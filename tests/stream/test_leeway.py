"""How much a stream copies at once: what it makes of what guests wait, and how it finds that out."""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockd.block.node import FillCounts
from blockd.extents import Extent, Kind, Range
from blockd.filters.guest_waits import GuestWaits
from blockd.jobs.leeway import LENGTH_MIN, STEP, Leeway
from blockd.jobs.manager import JobManager
from blockd.jobs.pace import LENGTH_MIN as COPY_LENGTH_MIN
from blockd.jobs.pace import LONG_S, SHORT_S, Pace
from blockd.jobs.stream import (
    APART_FACTOR,
    COPY_COUNT,
    COPY_COUNT_ALL,
    COPY_LENGTH,
    LEEWAY_INTERVAL_S,
    StreamJob,
)
from blockd.units import GIB, KIB, MIB
from tests import qemu_img
from tests.control.fakes import Recorder
from tests.control.running import running
from tests.nbd.memory_node import MemoryNode
from tests.virtual_time import now, run

LENGTH_MAX = COPY_LENGTH * COPY_COUNT
TARGET_S = 0.005
LATE, IN_TIME = 2 * TARGET_S, TARGET_S / 2


# -- the rule ---------------------------------------------------------------------------------


def leeway_after(*latencies: float | None, target_s: float = TARGET_S) -> Leeway:
    leeway = Leeway(COPY_LENGTH, COPY_COUNT, target_s)
    for latency in latencies:
        leeway.adapt(latency)
    return leeway


@pytest.mark.parametrize(
    ("latencies", "count", "length"),
    [
        ([], 6, 4 * MIB),
        ([LATE], 3, 4 * MIB),
        ([LATE] * 2, 1, 4 * MIB),
        ([LATE] * 3, 1, 3 * MIB),
        ([LATE] * 7, 1, 256 * KIB),
        ([LATE] * 9, 1, 256 * KIB),
        ([LATE] * 9 + [IN_TIME], 1, 256 * KIB + STEP),
        ([LATE] * 9 + [IN_TIME] * 8, 2, 4 * MIB),
        ([LATE] * 9 + [IN_TIME] * 24, 6, 4 * MIB),
        ([LATE] * 9 + [None] * 4, 1, 4 * MIB),
        ([LATE] * 9 + [None] * 7, 6, 4 * MIB),
        ([TARGET_S], 6, 4 * MIB),
    ],
)
def test_fewer_copies_then_shorter_ones(latencies: list[float | None], count: int, length: int) -> None:
    leeway = leeway_after(*latencies)
    assert (leeway.copy_count, leeway.copy_length) == (count, length)


def test_without_a_target_nothing_counts() -> None:
    assert leeway_after(3600.0, target_s=0.0).length == LENGTH_MAX


LATENCIES = st.lists(st.none() | st.floats(0, 10))


@given(LATENCIES)
def test_bounds_hold(latencies: list[float | None]) -> None:
    leeway = leeway_after(*latencies)
    assert LENGTH_MIN <= leeway.length <= LENGTH_MAX
    assert 1 <= leeway.copy_count <= COPY_COUNT
    assert 0 < leeway.copy_length <= COPY_LENGTH
    assert leeway.copy_count * leeway.copy_length <= leeway.length


@given(LATENCIES, st.floats(0, 10), st.floats(0, 10))
def test_longer_waits_never_leave_more(latencies: list[float | None], one: float, other: float) -> None:
    shorter, longer = sorted((one, other))
    assert leeway_after(*latencies, longer).length <= leeway_after(*latencies, shorter).length


@given(LATENCIES)
def test_everything_comes_back(latencies: list[float | None]) -> None:
    assert leeway_after(*latencies, *[IN_TIME] * 24).length == LENGTH_MAX
    assert leeway_after(*latencies, *[None] * 7).length == LENGTH_MAX


def test_small_copies_are_the_smallest() -> None:
    leeway = Leeway(4 * KIB, 1, TARGET_S)
    leeway.adapt(LATE)
    assert (leeway.copy_count, leeway.copy_length) == (1, 4 * KIB)


# -- what guests wait -------------------------------------------------------------------------


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_waits_are_averaged_and_then_forgotten() -> None:
    clock = Clock()
    waits = GuestWaits(clock)
    for duration in (1, 3):
        with waits.waiting():
            clock.now_s += duration
    assert waits.take() == 2
    assert waits.take() is None


def test_who_still_waits_counts_each_time() -> None:
    clock = Clock()
    waits = GuestWaits(clock)
    with waits.waiting():
        clock.now_s += 1
        assert waits.take() == 1
        clock.now_s += 1
        assert waits.take() == 2
    assert waits.take() == 2
    assert waits.take() is None


def test_requests_answered_at_once_are_no_wait_but_somebody() -> None:
    clock = Clock()
    waits = GuestWaits(clock)
    waits.tried_count += 5
    assert waits.take() == 0
    assert waits.take() is None
    waits.tried_count += 5
    with waits.waiting():
        clock.now_s += 1
    assert waits.take() == 1


def test_wait_that_fails_was_one() -> None:
    clock = Clock()
    waits = GuestWaits(clock)
    with pytest.raises(OSError, match="no"), waits.waiting():
        clock.now_s += 1
        raise OSError("no")
    assert waits.take() == 1


# -- one copy ---------------------------------------------------------------------------------


def pace_after(*durations_s: float) -> int:
    pace = Pace(COPY_LENGTH)
    for duration_s in durations_s:
        pace.note(pace.length, duration_s)
    return pace.length


def test_copies_are_as_long_as_the_disks_do_in_a_moment() -> None:
    slow, fast, fair = LONG_S * 1.1, SHORT_S * 0.9, (LONG_S + SHORT_S) / 2
    assert pace_after() == pace_after(fast, fast, fair) == COPY_LENGTH
    assert pace_after(slow) == COPY_LENGTH // 2
    assert pace_after(*[slow] * 9) == COPY_LENGTH_MIN
    assert pace_after(slow, slow, fair, fair, fast) == COPY_LENGTH // 2
    assert pace_after(slow, slow, *[fast] * 9) == COPY_LENGTH


def test_a_short_piece_does_not_tell_that_longer_ones_are_fast() -> None:
    pace = Pace(COPY_LENGTH)
    pace.note(COPY_LENGTH, LONG_S * 2)
    pace.note(COPY_LENGTH // 4, SHORT_S / 2)
    assert pace.length == COPY_LENGTH // 2


def test_copies_of_a_slow_disk_become_short_and_long_again() -> None:
    async def main() -> None:
        disk = WatchedDisk()
        job = StreamJob("j", disk, base_filename=None, base_format=None, clock=now)  # type: ignore[arg-type]
        async with JobManager(Recorder()) as jobs:
            jobs.start(job)
            disk.copy_s = 2 * LONG_S
            assert await disk.seen_in(20) == (COPY_COUNT, {COPY_LENGTH_MIN})
            disk.copy_s = SHORT_S / 2
            assert await disk.seen_in(20) == (COPY_COUNT, {COPY_LENGTH})

    run(main())


# -- the job ----------------------------------------------------------------------------------


class WatchedDisk:
    """A disk of which all is missing, and a guest that waits for it as long as it is told to."""

    def __init__(self) -> None:
        self.size = 64 * 1024 * GIB
        self.guest_written = 0
        self.active = MemoryNode(0, cluster_size=64 * KIB)
        self.guest_waits = self
        self.copies_in_order = False
        self.waited_s: float | None = None
        self.copy_s = 0.001
        # Copies under way, the most of them since it was last looked, and the lengths of those that began.
        self._copy_count = 0
        self.copy_count_max = 0
        self.lengths: set[int] = set()

    def take(self) -> float | None:
        return self.waited_s

    async def missing(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, Kind.DATA)]

    async def populate(self, ranges: Sequence[Range]) -> FillCounts:
        length = sum(end - start for start, end in ranges)
        self._copy_count += 1
        self.copy_count_max = max(self.copy_count_max, self._copy_count)
        self.lengths.add(length)
        await asyncio.sleep(self.copy_s)
        self._copy_count -= 1
        return FillCounts(length, 0, 0)

    async def run_staging(self) -> None:
        """Nobody writes."""

    async def flush(self) -> None:
        """Nothing to flush."""

    async def seen_in(self, seconds: float) -> tuple[int, set[int]]:
        """The most copies at once, and the lengths of those that began, in the last tenth of a time."""
        await asyncio.sleep(0.9 * seconds)
        self.copy_count_max, self.lengths = 0, set()
        await asyncio.sleep(0.1 * seconds)
        return self.copy_count_max, self.lengths


@pytest.mark.parametrize("speed", [0, 640 * MIB])
def test_job_holds_back_while_guests_wait(speed: int) -> None:
    async def main() -> None:
        disk = WatchedDisk()
        job = StreamJob("j", disk, base_filename=None, base_format=None, speed=speed, clock=now)  # type: ignore[arg-type]
        async with JobManager(Recorder()) as jobs:
            jobs.start(job)
            assert await disk.seen_in(1) == (COPY_COUNT, {COPY_LENGTH})
            disk.waited_s = LATE
            assert await disk.seen_in(1) == (1, {LENGTH_MIN})
            disk.waited_s = IN_TIME
            assert await disk.seen_in(4) == (COPY_COUNT, {COPY_LENGTH})
            disk.waited_s = LATE
            assert await disk.seen_in(1) == (1, {LENGTH_MIN})
            disk.waited_s = None
            assert await disk.seen_in(1) == (COPY_COUNT, {COPY_LENGTH})
            # Nothing was left out, nothing copied twice.
            job.pause()
            await asyncio.sleep(1)
            assert job.counters.copied == job.offset

    run(main())


def test_a_machine_that_stands_still_ends_no_stream() -> None:
    """Between any two looks at the clock longer may pass than guests are watched for at once."""

    async def main() -> None:
        disk = WatchedDisk()
        stands_still_s = itertools.count(step=2 * LEEWAY_INTERVAL_S)
        job = StreamJob(
            "j",
            disk,  # type: ignore[arg-type]
            base_filename=None,
            base_format=None,
            clock=lambda: now() + next(stands_still_s),
        )
        async with JobManager(Recorder()) as jobs:
            jobs.start(job)
            while job.offset < 4 * COPY_LENGTH:
                assert job.error is None
                await asyncio.sleep(LEEWAY_INTERVAL_S)

    run(main())


def test_copies_apart_are_fewer_and_longer() -> None:
    """The loop has less to do for them; they go back as soon as they are made in threads again."""

    class ApartNode(MemoryNode):
        copies_apart = True

    async def main() -> None:
        disk = WatchedDisk()
        disk.active = ApartNode(0, cluster_size=64 * KIB)
        job = StreamJob("j", disk, base_filename=None, base_format=None, clock=now)  # type: ignore[arg-type]
        async with JobManager(Recorder()) as jobs:
            jobs.start(job)
            assert await disk.seen_in(1) == (COPY_COUNT // 2, {APART_FACTOR * COPY_LENGTH})
            disk.waited_s = LATE
            assert await disk.seen_in(1) == (1, {APART_FACTOR * LENGTH_MIN})
            disk.waited_s = None
            disk.active = MemoryNode(0, cluster_size=64 * KIB)
            assert await disk.seen_in(1) == (COPY_COUNT, {COPY_LENGTH})

    run(main())


def test_others_have_their_turn_while_the_map_is_looked_at() -> None:
    """Also where all of it is in memory, so that nothing waits."""

    class CopiedDisk(WatchedDisk):
        looked_at = most = 0

        async def missing(self, offset: int, length: int) -> list[Extent]:
            self.looked_at += 1
            self.most = max(self.most, self.looked_at)
            return [Extent(offset, min(MIB, length), Kind.UNALLOCATED)]

    async def main() -> None:
        disk = CopiedDisk()
        disk.size = 500 * MIB
        job = StreamJob("j", disk, base_filename=None, base_format=None, clock=now)  # type: ignore[arg-type]
        async with JobManager(Recorder()) as jobs:
            jobs.start(job)
            while job.offset < job.length:
                disk.looked_at = 0
                await asyncio.sleep(0)
        assert 0 < disk.most < 5

    run(main())


def test_many_streams_share_the_copies() -> None:
    async def main() -> None:
        disks = [WatchedDisk() for _ in range(4)]
        jobs_of = [
            StreamJob(f"j{number}", disk, base_filename=None, base_format=None, clock=now)  # type: ignore[arg-type]
            for number, disk in enumerate(disks)
        ]
        async with JobManager(Recorder()) as jobs:
            for job in jobs_of:
                jobs.start(job)
            await asyncio.sleep(1)
            for disk in disks:
                assert await disk.seen_in(0.1) == (COPY_COUNT_ALL // 4, {COPY_LENGTH})
            for job in jobs_of[1:]:
                job.pause()
            assert await disks[0].seen_in(1) == (COPY_COUNT, {COPY_LENGTH})
            for job in jobs_of[1:]:
                job.resume()
            await asyncio.sleep(1)
            for disk in disks:
                assert await disk.seen_in(0.1) == (COPY_COUNT_ALL // 4, {COPY_LENGTH})

    run(main())


# -- the daemon -------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "target_s"), [([], 0.005), (["--guest-latency", "250"], 0.00025)])
async def test_target_is_the_daemons(tmp_path: Path, option: list[str], target_s: float) -> None:
    qemu_img.create(tmp_path / "base.qcow2", MIB)
    active = qemu_img.create(tmp_path / "active.qcow2", MIB, backing=tmp_path / "base.qcow2")
    async with running(tmp_path, *option, "--device", f"vda={active}") as daemon:
        qmp = await daemon.qmp()
        await qmp.command("block-stream", {"device": "vda", "auto-finalize": False})
        [stream] = daemon.services.streams.running
        assert stream.job.leeway.target_s == target_s
        await qmp.command("job-cancel", {"id": "vda"})


@pytest.mark.slow
async def test_stream_holds_back_while_a_guest_waits_for_the_disk(tmp_path: Path) -> None:
    """The disk takes a tenth of a second for every write, whoever it is from."""
    base, active = tmp_path / "base.raw", tmp_path / "active.qcow2"
    base.write_bytes(b"base" * (256 * MIB // 4))
    qemu_img.create(active, 256 * MIB, backing=base, backing_format="raw")
    file = f"file.driver=faults,file.image.driver=file,file.image.filename={active}"
    delay = "file.delay.0.event=none,file.delay.0.iotype=write,file.delay.0.milliseconds=100"
    node = ("--blockdev", f"qcow2,node-name=disk,{file},{delay}")
    device = ("--device", "id=vda,node-name=disk")
    export = ("--export", "nbd,id=disk,node-name=disk,name=disk,writable=on")
    async with running(tmp_path, *node, *device, *export) as daemon:
        qmp, guest = await daemon.qmp(), await daemon.guest("disk")

        async def leeway() -> int:
            [stream] = await qmp.command("query-block-stream")
            found: int = stream["leeway"]
            return found

        async def write_for_ever() -> None:
            while True:
                await guest.write(0, b"guest" * 4096)

        await qmp.command("block_stream", device="vda")
        assert await leeway() == LENGTH_MAX
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(write_for_ever())
            while await leeway() > LENGTH_MIN:
                pass
            writing.cancel()
        while await leeway() < LENGTH_MAX:
            pass
        await qmp.command("block_stream_cancel", device="vda")
    base.unlink()  # it is large
