"""Parts of clusters that a guest writes while the source is slow, each race as a schedule with a name.

A filter stages and merges, as it does while a stream runs; the source is held, the guest does something,
the source is released.
"""

import asyncio
import errno
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from blockd.aio import task_group
from blockd.block.node import FillCounts
from blockd.errors import StorageError
from blockd.extents import Range
from blockd.filters import blkstream, staged_writes
from blockd.filters.staged_writes import PIECE_COST
from blockd.formats.qcow2.check import check
from blockd.jobs.job import OnError
from blockd.jobs.states import JobStatus
from tests.chains import read_all
from tests.inline_threads import steps, use_inline_threads
from tests.recording import RecordingFile
from tests.stream.held_source import CLUSTER, COUNT, Rig, rig
from tests.streaming import open_overlay

BROKEN = StorageError("the source is broken", errno=errno.EIO)
# After so many turns of the loop nothing moves any more but what waits for the source.
SETTLED_STEP_COUNT = 60


@pytest.fixture(autouse=True)
async def inline_threads() -> None:
    use_inline_threads()


@asynccontextmanager
async def keeping(base: str = "B" * COUNT) -> AsyncIterator[Rig]:
    """A filter that stages and merges, over a source that is held; all of it is merged after the block."""
    async with rig(base) as scene:
        scene.source.hold()
        async with task_group() as tasks:
            task = tasks.create_task(scene.node.run_staging())
            await steps(2)
            try:
                yield scene
            finally:
                scene.source.release()
                task.cancel()
        await scene.node.flush_staged()
        assert staged_count(scene) == 0
        await whole_after_stream(scene)


async def whole_after_stream(scene: Rig) -> None:
    """What guests find is right; the image alone has it too when a stream has ended, and leaks nothing."""
    await scene.compare()
    assert (await scene.stream_to_end()).error is None
    assert (await scene.whole_image()).leaks == 0


def staged_count(scene: Rig) -> int:
    return len(scene.node._staged.runs(CLUSTER))


async def after_crash(scene: Rig) -> bytes:
    """What a guest would find if the power went now; a test file has no cache that could be lost."""
    image = await open_overlay(RecordingFile(bytes(scene.file.disk)), scene.source.child, read_only=True)
    return await read_all(image)


# -- writes do not wait -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length", "cluster_count"),
    [
        (512, 512, 1),
        (0, 512, 1),
        (CLUSTER - 512, 512, 1),
        (100, 17, 1),
        (CLUSTER // 2, CLUSTER, 2),
        (512, 3 * CLUSTER, 2),
        (COUNT * CLUSTER - 100, 100, 1),
    ],
)
async def test_a_part_is_staged_and_found(offset: int, length: int, cluster_count: int) -> None:
    async with keeping() as scene:
        await scene.write(offset, length)
        assert staged_count(scene) == cluster_count
        await scene.write(offset, length)
        scene.model.check_read(offset, bytes(await scene.node.read(offset, length)))


async def test_a_part_of_a_cluster_that_is_being_copied_is_staged() -> None:
    async with keeping() as scene:
        copy = asyncio.ensure_future(scene.node.populate([(0, 3 * CLUSTER)]))
        await scene.source.reached.wait()
        await scene.write(CLUSTER + 512, 512)
        assert staged_count(scene) == 1
        scene.source.release()
        assert (await copy).copied == 3 * CLUSTER
        assert staged_count(scene) == 0
        assert scene.source.read_count == 1  # the copy was enough for both


async def test_a_part_of_an_own_cluster_does_not_wait_for_the_copy_around_it() -> None:
    async with keeping() as scene:
        await scene.write(CLUSTER, CLUSTER)
        copy = asyncio.ensure_future(scene.node.populate([(0, 3 * CLUSTER)]))
        await scene.source.reached.wait()
        scene.file.is_slow = True
        await scene.write(CLUSTER + 512, 512)
        await scene.write(2 * CLUSTER - 512, 512)
        assert staged_count(scene) == 0
        scene.source.release()
        assert (await copy).copied == 2 * CLUSTER


async def test_zeroes_for_a_part_are_staged() -> None:
    async with keeping() as scene:
        await scene.change(scene.node.write_zeroes, 512, 2 * CLUSTER)
        assert staged_count(scene) == 2


async def test_staged_writes_are_merged_without_anybody_asking() -> None:
    async with keeping() as scene:
        for index in range(COUNT):
            await scene.write(index * CLUSTER + 512 * index, 512)
        await steps(SETTLED_STEP_COUNT)
        assert staged_count(scene) == COUNT
        scene.source.release()
        await steps(20 * SETTLED_STEP_COUNT)
        assert staged_count(scene) == 0
        assert scene.source.read_count <= 2  # neighbours are read at once


async def test_all_parts_of_a_cluster_need_no_source() -> None:
    async with keeping() as scene:
        for start in range(0, CLUSTER, 512):
            await scene.write(start, 512)
        await scene.node.flush()
        assert staged_count(scene) == 0
        scene.model.check_read(0, (await after_crash(scene))[:CLUSTER])


async def test_a_read_of_the_rest_waits_and_finds_both() -> None:
    async with keeping() as scene:
        await scene.write(512, 512)
        read = asyncio.ensure_future(scene.node.read(0, CLUSTER))
        await steps(SETTLED_STEP_COUNT)
        assert not read.done()
        scene.source.release()
        scene.model.check_read(0, bytes(await read))


async def test_nobody_who_looks_past_the_filter_misses_a_part() -> None:
    async with keeping("0" * COUNT) as scene:
        await scene.write(512, 512)
        scene.source.release()
        assert scene.node.kind_nowait(0, CLUSTER) is None
        for look in (scene.node.catch_up(), scene.node.map(0, CLUSTER), scene.node.plan_read(0, CLUSTER)):
            await scene.write(CLUSTER + 100, 100)
            await look
            scene.model.check_read(0, bytes(await scene.disk.active.read(0, CLUSTER)))


# -- what is newer wins -----------------------------------------------------------------------------


Newer = Callable[[Rig], Coroutine[Any, Any, Any]]
NEWER: dict[str, Newer] = {
    "whole write": lambda scene: scene.write(0, CLUSTER),
    "write of more": lambda scene: scene.write(0, 2 * CLUSTER + 512),
    "write of the part": lambda scene: scene.write(512, 512),
    "write across the part": lambda scene: scene.write(256, 512),
    "zeroes": lambda scene: scene.change(scene.node.write_zeroes, 0, CLUSTER),
    "zeroes for the part": lambda scene: scene.change(scene.node.write_zeroes, 512, 512),
    "discard": lambda scene: scene.change(scene.node.discard, 0, 2 * CLUSTER),
}


@pytest.mark.parametrize("name", NEWER)
@pytest.mark.parametrize("step_count", [0, 3, 20])
async def test_what_comes_later_wins(name: str, step_count: int) -> None:
    async with keeping() as scene:
        await scene.write(512, 512)
        await steps(step_count)
        await NEWER[name](scene)
        scene.model.check_read(512, bytes(await scene.node.read(512, 512)))


@pytest.mark.parametrize("name", NEWER)
@pytest.mark.parametrize("step_count", range(0, 24, 3))
async def test_what_comes_while_a_part_lands_wins(name: str, step_count: int) -> None:
    """The file is slow too, so that a landing takes several turns of the loop."""
    async with keeping() as scene:
        scene.file.is_slow = True
        await scene.write(512, 512)
        await scene.write(2048, 512)
        await steps(5)
        scene.source.release()
        await steps(step_count)
        await NEWER[name](scene)
        await scene.compare()


async def test_a_whole_write_that_fails_leaves_the_part() -> None:
    async with keeping() as scene:
        await scene.write(512, 512)
        await scene.write(2 * CLUSTER, CLUSTER)
        scene.file.fail_at(1, errno.ENOSPC)
        with pytest.raises(StorageError):
            await scene.write(0, CLUSTER)
        scene.file.work()
        assert staged_count(scene) == 1


# -- flush ------------------------------------------------------------------------------------------


async def test_flush_waits_until_parts_are_merged_and_durable() -> None:
    async with keeping() as scene:
        await scene.write(512, 512)
        durable = scene.model.begin_flush()
        flush = asyncio.ensure_future(scene.node.flush())
        await steps(SETTLED_STEP_COUNT)
        assert not flush.done()
        scene.source.release()
        await flush
        scene.model.finish_flush(durable)
        assert list(scene.model.after_crash().problems(await after_crash(scene))) == []


async def test_a_crash_before_the_flush_loses_the_part_and_nothing_else() -> None:
    async with keeping() as scene:
        await scene.write(CLUSTER, CLUSTER)
        await scene.disk.active.flush()
        await scene.write(512, 512)
        assert list(scene.model.after_crash().problems(await after_crash(scene))) == []


async def test_flush_does_not_wait_for_parts_that_come_later() -> None:
    async with keeping() as scene:
        await scene.write(512, 512)
        flush = asyncio.ensure_future(scene.node.flush())
        await steps(SETTLED_STEP_COUNT)
        scene.source.release()
        for _ in range(20 * SETTLED_STEP_COUNT):
            if flush.done():
                break
            await scene.write(3 * CLUSTER + 512, 512)
            await steps(1)
        assert flush.done()


# -- errors -----------------------------------------------------------------------------------------


async def test_flush_reports_that_the_source_is_broken_and_nothing_is_lost() -> None:
    async with keeping() as scene:
        scene.source.error = BROKEN
        await scene.write(512, 512)
        scene.source.release()
        await steps(SETTLED_STEP_COUNT)
        for _ in range(2):
            with pytest.raises(StorageError, match="broken"):
                await scene.node.flush()
            scene.model.check_read(512, bytes(await scene.node.read(512, 512)))
        scene.source.error = None
        await scene.node.flush()
        assert staged_count(scene) == 0


async def test_one_part_that_cannot_be_merged_does_not_hold_up_the_others() -> None:
    async with keeping() as scene:
        scene.source.error = BROKEN
        await scene.write(512, 512)
        scene.source.release()
        await steps(SETTLED_STEP_COUNT)
        scene.source.error = None
        await scene.write(3 * CLUSTER + 512, 512)
        await steps(SETTLED_STEP_COUNT)
        assert staged_count(scene) == 1


async def test_a_full_disk_is_reported_by_flush() -> None:
    async with keeping() as scene:
        await scene.write(512, 512)
        scene.file.fails = lambda _: errno.ENOSPC
        scene.source.release()
        await steps(SETTLED_STEP_COUNT)
        with pytest.raises(StorageError):
            await scene.node.flush()
        scene.file.work()
        scene.model.check_read(0, bytes(await scene.node.read(0, CLUSTER)))


async def test_the_policy_of_the_stream_meets_what_cannot_be_merged() -> None:
    """on-error=stop: the job pauses until the source is well again; then nothing was lost."""
    async with rig() as scene:
        scene.source.hold()
        scene.source.error = BROKEN
        job = await scene.disk.start(None, on_error=OnError.STOP)
        await scene.source.reached.wait()
        await scene.write(512, 512)
        scene.source.release()
        await steps(10 * SETTLED_STEP_COUNT)
        assert job.status is JobStatus.PAUSED
        scene.source.error = None
        job.resume()
        await job.wait_ended()
        assert job.error is None
        assert (await scene.whole_image()).leaks == 0


# -- the bounds -------------------------------------------------------------------------------------


async def _write_beyond_the_bound(scene: Rig, fitting_count: int) -> None:
    for index in range(fitting_count):
        await scene.write(index * CLUSTER + 512, 512)
    waiting = [
        asyncio.ensure_future(scene.write(fitting_count * CLUSTER + 512, 512)),
        asyncio.ensure_future(scene.write((fitting_count + 1) * CLUSTER - 512, 1024)),
    ]
    await steps(SETTLED_STEP_COUNT)
    assert [write.done() for write in waiting] == [False, False]
    assert staged_count(scene) == fitting_count
    await scene.write((fitting_count + 2) * CLUSTER, CLUSTER)  # a whole cluster needs no memory
    scene.source.release()
    await asyncio.gather(*waiting)


async def test_at_the_bound_of_memory_writes_wait_for_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_writes, "STAGED_LENGTH_MAX", 3 * (512 + PIECE_COST))
    async with keeping() as scene:
        await _write_beyond_the_bound(scene, 3)


async def test_at_the_bound_of_clusters_writes_wait_for_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_writes, "STAGED_CLUSTER_COUNT_MAX", 2)
    async with keeping() as scene:
        await _write_beyond_the_bound(scene, 2)


async def test_at_the_bound_a_write_meets_the_error_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_writes, "STAGED_LENGTH_MAX", 512 + PIECE_COST)
    async with keeping() as scene:
        scene.source.error = BROKEN
        await scene.write(512, 512)
        scene.source.release()
        for offset in (2048, 2 * CLUSTER + 512):
            with pytest.raises(StorageError, match="broken"):
                await scene.write(offset, 512)
        scene.source.error = None


async def test_all_parts_wait_at_once_for_a_source_that_needs_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blkstream, "MERGE_THREAD_COUNT", 2)
    count = 64
    async with keeping("B" * count) as scene:
        for index in range(0, count, 2):  # neighbours would be one merge
            await scene.write(index * CLUSTER + 512, 512)
        await steps(SETTLED_STEP_COUNT)
        assert scene.source.read_count == count // 2


async def test_few_merges_at_once_read_the_source_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blkstream, "MERGE_THREAD_COUNT", 8)
    count = 32
    async with keeping("B" * count) as scene:
        may_end = asyncio.Event()
        started: list[int] = []
        fill = scene.node.active.fill

        async def held_fill(ranges: Sequence[Range], *arguments: Any, **options: Any) -> FillCounts:
            started.append(ranges[0][0])
            await may_end.wait()
            return await fill(ranges, *arguments, **options)

        monkeypatch.setattr(scene.node.active, "fill", held_fill)
        monkeypatch.setattr(scene.source, "plan_read", scene.source.child.plan_read)
        for index in range(0, count, 2):
            await scene.write(index * CLUSTER + 512, 512)
        await steps(SETTLED_STEP_COUNT)
        assert len(started) == 8
        may_end.set()
        await steps(SETTLED_STEP_COUNT)
        assert len(started) == count // 2


# -- cancels ----------------------------------------------------------------------------------------

ACTIONS: dict[str, Newer] = {
    **NEWER,
    "read": lambda scene: scene.node.read(0, 2 * CLUSTER),
    "populate": lambda scene: scene.node.populate([(0, COUNT * CLUSTER)]),
    "flush": lambda scene: scene.node.flush(),
}


@pytest.mark.parametrize("name", ACTIONS)
async def test_cancelled_at_every_await(name: str) -> None:
    """Beside kept parts that are just being merged."""
    for step_count in itertools.count():
        async with keeping() as scene:
            scene.file.is_slow = True
            await scene.write(512, 512)
            await scene.write(CLUSTER - 100, 200)
            scene.source.release()
            task = asyncio.ensure_future(ACTIONS[name](scene))
            await steps(step_count)
            has_ended = task.done()
            task.cancel()
            await asyncio.wait([task])
        if has_ended:
            break
    assert step_count >= 1


async def test_stream_cancelled_at_every_await_merges_what_is_staged() -> None:
    for step_count in itertools.count():
        async with rig() as scene:
            job = await scene.disk.start(None)
            await steps(step_count)
            has_ended = not job.can_be_cancelled
            for index in range(COUNT):
                await scene.write(index * CLUSTER + 100, 100)
            if job.can_be_cancelled:
                job.cancel()
            await job.wait_ended()
            await scene.compare()
            await scene.disk.active.flush()
            report = await check(RecordingFile(bytes(scene.file.disk)))
            assert (report.corruptions, report.leaks) == (0, 0), report.findings
            if job.is_cancelled:
                await whole_after_stream(scene)
        if has_ended:
            break
    assert step_count > 5


@pytest.mark.parametrize("step_count", range(0, 120, 4))
async def test_parts_of_every_cluster_at_any_moment_of_a_stream(step_count: int) -> None:
    async with rig("BB0B-BBB") as scene:
        job = await scene.disk.start(None)
        await steps(step_count)
        for index in reversed(range(COUNT)):
            await scene.write(index * CLUSTER + 512, 512)
            await steps(1)
        await scene.compare()
        await job.wait_ended()
        assert job.error is None
        await scene.compare()
        assert (await scene.whole_image()).leaks == 0
