"""Speed limits: within 5 % over ten seconds, and never more than a slice at once."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import pytest

from blockd.block.node import FillCounts
from blockd.extents import Extent, Kind, Range
from blockd.jobs.manager import JobManager
from blockd.jobs.stream import RATE_SLICE_S, StreamJob
from blockd.ratelimit import SLICE_S
from blockd.units import GIB, KIB, MIB
from tests.control.fakes import Recorder
from tests.nbd.memory_node import MemoryNode
from tests.virtual_time import now, run

CLUSTER = 64 * KIB


class NoGuests:
    """Nobody who could wait."""

    def take(self) -> None:
        return None


class SlowTarget:
    """A disk of which all is missing; copying takes its time, and when it is done is written down."""

    def __init__(self, copy_s: float) -> None:
        self.size = 100 * GIB
        self.guest_written = 0
        self.guest_waits = NoGuests()
        self.copies_in_order = False
        self.active = MemoryNode(0, cluster_size=CLUSTER)
        self.copies: list[tuple[float, int]] = []
        self.copy_s = copy_s

    async def missing(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, Kind.DATA)]

    async def populate(self, ranges: Sequence[Range]) -> FillCounts:
        length = sum(end - start for start, end in ranges)
        await asyncio.sleep(self.copy_s * length / MIB)
        self.copies.append((now(), length))
        return FillCounts(length, 0, 0)

    async def run_staging(self) -> None:
        """Nobody writes."""

    async def flush(self) -> None:
        """Nothing to flush."""

    def copied(self, start: float, end: float) -> int:
        return sum(length for time, length in self.copies if start <= time < end)


def job_of(target: SlowTarget, speed: int) -> StreamJob:
    return StreamJob(
        "j",
        target,  # type: ignore[arg-type]
        base_filename=None,
        base_format=None,
        speed=speed,
        clock=now,
    )


async def stream_for(seconds: float, target: SlowTarget, *speeds: int) -> list[float]:
    """Stream with each speed for so long; returns when each began, and the end."""
    job = job_of(target, speeds[0])
    times = []
    async with JobManager(Recorder()) as jobs:
        jobs.start(job)
        for speed in speeds:
            times.append(now())
            job.set_speed(speed)
            await asyncio.sleep(seconds)
        times.append(now())
    return times


@pytest.mark.parametrize("speed", [MIB, 10 * MIB + 12345, 200 * MIB])
@pytest.mark.parametrize("copy_s", [0.0, 0.001, 0.004])
def test_within_five_percent_over_ten_seconds(speed: int, copy_s: float) -> None:
    """Whatever the copying itself takes, as long as the disk could do more."""
    target = SlowTarget(copy_s)
    start, end = run(stream_for(10, target, speed))
    assert target.copied(start, end) == pytest.approx(10 * speed, rel=0.05)


@pytest.mark.parametrize("speed", [MIB, 50 * MIB])
def test_no_burst_over_one_slice(speed: int) -> None:
    target = SlowTarget(0.0005)
    run(stream_for(5, target, speed))
    for time, _ in target.copies:
        # What a slice allows, what may be caught up, and the copy that may have been under way.
        allowed = speed * (2 * RATE_SLICE_S + SLICE_S) + CLUSTER
        assert target.copied(time, time + RATE_SLICE_S) <= allowed


def test_disk_that_was_held_up_does_not_catch_up_in_a_burst() -> None:
    async def main() -> tuple[int, float]:
        target = SlowTarget(0.0)
        async with asyncio.TaskGroup() as tasks:
            streaming = tasks.create_task(stream_for(8, target, MIB))
            await asyncio.sleep(2)
            target.copy_s = 50.0  # one slice takes five seconds
            await asyncio.sleep(1)
            target.copy_s = 0.0
            await streaming
        gap_end = max(after for (before, _), (after, _) in pairwise(target.copies) if after - before > 2)
        return target.copied(gap_end, gap_end + 0.5), gap_end

    copied, _ = run(main())
    assert copied <= MIB * (0.5 + RATE_SLICE_S + SLICE_S) + CLUSTER


def test_new_speed_holds_at_once() -> None:
    target = SlowTarget(0.0005)
    first, second, third, end = run(stream_for(4, target, MIB, 20 * MIB, 2 * MIB))
    for start, stop, speed in ((first, second, MIB), (second, third, 20 * MIB), (third, end, 2 * MIB)):
        assert target.copied(start, stop) == pytest.approx(4 * speed, rel=0.05)


@pytest.mark.parametrize("verb", ["pause", "set_speed"])
def test_two_clients_may_interrupt_the_wait_at_once(verb: str) -> None:
    """Whenever the second one comes: the job has not noticed the first one yet."""

    async def main(steps: int) -> float:
        job = job_of(SlowTarget(0.0), 1)
        async with JobManager(Recorder()) as jobs:
            jobs.start(job)
            await asyncio.sleep(10)
            job.set_speed(2)
            for _ in range(steps):
                await asyncio.sleep(0)
            job.set_speed(3) if verb == "set_speed" else job.pause()
            await asyncio.sleep(10)
            assert job.error is None
            assert job.status == ("running" if verb == "set_speed" else "paused")
        return now()

    for steps in range(6):
        run(main(steps))


def test_less_than_a_cluster_a_second() -> None:
    """A cluster at a time, and then as long a wait as that is worth."""
    target = SlowTarget(0.0)
    start, end = run(stream_for(100, target, CLUSTER // 10))
    assert target.copied(start, end) == pytest.approx(10 * CLUSTER, abs=CLUSTER)
