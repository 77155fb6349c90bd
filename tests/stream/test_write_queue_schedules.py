"""The races between guest writes and copies, each as a schedule with a name.

The source is held in the middle of a copy, the guest does something, the source is released.
"""

import asyncio
import errno
import functools
import itertools
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from blockd.errors import StorageError
from blockd.extents import Kind
from blockd.filters.write_queue import WriteQueue
from blockd.formats.qcow2.check import check
from tests.chains import read_all
from tests.cold_file import coldness
from tests.doubles import FailingFile
from tests.inline_threads import steps, use_inline_threads
from tests.recording import RecordingFile
from tests.scheduled_threads import RandomThreads, scheduled
from tests.stream.held_source import CLUSTER, COUNT, Change, Rig, copy_held, rig
from tests.streaming import open_overlay, overlay


@pytest.fixture(autouse=True, params=[0, 0.7, 1], ids=["warm", "cold", "all cold"])
async def cold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """So often files say that they would wait; then threads end in any order, and caches hold two tables."""
    use_inline_threads()
    if not request.param:
        yield
        return
    rng = random.Random(1)
    monkeypatch.setattr(Rig, "would_wait", staticmethod(coldness(rng, request.param)))
    with scheduled(RandomThreads(rng)):
        yield


# -- a copy is held, the guest writes ---------------------------------------------------------------


async def test_acknowledged_write_of_the_whole_cluster_survives_the_copy() -> None:
    async with rig() as scene:
        async with copy_held(scene):
            await scene.write(0, CLUSTER)
            scene.model.check_read(0, bytes(await scene.node.read(0, CLUSTER)))
        await scene.compare()
        await scene.stream_to_end()
        report = await scene.whole_image()
    assert (report.allocated_clusters, report.leaks) == (COUNT, 0)


async def test_acknowledged_write_survives_a_crash_after_the_copy() -> None:
    async with rig() as scene:
        async with copy_held(scene):
            await scene.write(0, CLUSTER)
        await scene.disk.root.top.flush()
        image = await open_overlay(RecordingFile(bytes(scene.file.disk)), scene.source, read_only=True)
        scene.model.check_read(0, await read_all(image))


async def test_write_in_the_middle_of_a_large_copy_keeps_the_rest() -> None:
    async with rig() as scene:
        async with copy_held(scene, 0, COUNT * CLUSTER) as copy:
            await scene.write(2 * CLUSTER, 3 * CLUSTER)
        assert copy.result().dropped == 3 * CLUSTER
        await scene.compare()
        await scene.stream_to_end()
        report = await scene.whole_image()
    assert (report.allocated_clusters, report.leaks) == (COUNT, 0)


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (512, 512),
        (0, 512),
        (CLUSTER - 512, 512),
        (100, 17),
        (CLUSTER // 2, CLUSTER),
        (512, 3 * CLUSTER),
    ],
)
async def test_write_of_a_part_waits_for_the_copy_and_lands_on_top(offset: int, length: int) -> None:
    async with rig() as scene:
        async with asyncio.TaskGroup() as tasks, copy_held(scene):
            write = tasks.create_task(scene.write(offset, length))
            await steps(20)
            assert not write.done()
            assert scene.source.read_count == 1  # it waits for the copy and does not read for itself
        await scene.compare()
        await scene.stream_to_end()
        report = await scene.whole_image()
    assert (report.allocated_clusters, report.leaks) == (COUNT, 0)


async def test_write_elsewhere_does_not_wait_for_a_held_source() -> None:
    async with rig() as scene, copy_held(scene):
        await scene.write(CLUSTER, 2 * CLUSTER)
        await scene.write(CLUSTER + 100, 512)


async def test_own_cluster_is_read_and_written_while_the_source_is_held() -> None:
    async with rig() as scene:
        await scene.write(0, CLUSTER)
        async with copy_held(scene, CLUSTER):
            await scene.write(512, 512)
            assert await scene.node.read(0, CLUSTER) == scene.model.content[:CLUSTER]


async def test_read_does_not_wait_for_the_copy_of_what_it_reads() -> None:
    """It copies what nobody does."""
    async with rig() as scene:
        async with copy_held(scene, CLUSTER, 2 * CLUSTER):
            held = scene.source.hold_no_more()
            found = await scene.node.read(512, 4 * CLUSTER)
            assert found == scene.model.content[512 : 512 + 4 * CLUSTER]
            kinds = [extent.kind for extent in await scene.disk.active.map(0, 5 * CLUSTER)]
            assert kinds == [Kind.DATA, Kind.UNALLOCATED, Kind.DATA]
            held.set()
        await scene.compare()
        await scene.stream_to_end()
        report = await scene.whole_image()
    assert (report.allocated_clusters, report.leaks) == (COUNT, 0)


async def test_what_is_not_being_copied() -> None:
    queue = WriteQueue(CLUSTER)
    async with queue.copying([(2, 4), (6, 7)]), queue.copying([(4, 6)], is_for_guest=True):
        assert queue.uncopied(0, 8) == [(0, 2), (4, 6), (7, 8)]
        assert queue.uncopied(2, 4) == queue.uncopied(3, 4) == []
        assert queue.uncopied(3, 6) == [(4, 6)]
        assert queue.uncopied(8, 8) == []
    assert queue.uncopied(0, 8) == [(0, 8)]


@pytest.mark.parametrize("kind", ["write_zeroes", "write_zeroes without unmap", "discard"])
async def test_zeroes_for_the_whole_cluster_survive_the_copy(kind: str) -> None:
    async with rig() as scene:
        async with copy_held(scene, 0, 2 * CLUSTER):
            node = scene.node
            calls: dict[str, Change] = {
                "write_zeroes": node.write_zeroes,
                "write_zeroes without unmap": functools.partial(node.write_zeroes, unmap=False),
                "discard": node.discard,
            }
            await scene.change(calls[kind], 0, CLUSTER)
        await scene.compare()
        await scene.stream_to_end()
        report = await scene.whole_image()
    assert report.leaks == 0


async def test_zeroes_for_a_part_wait_for_the_copy() -> None:
    async with rig() as scene:
        async with asyncio.TaskGroup() as tasks, copy_held(scene):
            zero = tasks.create_task(scene.change(scene.node.write_zeroes, 512, 1024))
            await steps(20)
            assert not zero.done()
        await scene.compare()
        await scene.stream_to_end()
        await scene.whole_image()


async def test_write_then_discard_then_write_during_one_copy() -> None:
    async with rig() as scene:
        async with copy_held(scene):
            await scene.write(0, CLUSTER)
            await scene.change(scene.node.discard, 0, CLUSTER)
            await scene.write(512, 512)
        await scene.compare()
        await scene.stream_to_end()
        assert (await scene.whole_image()).leaks == 0


# -- several copies -----------------------------------------------------------------------------------


async def test_two_fills_of_one_cluster_allocate_it_once() -> None:
    async with rig() as scene:
        scene.source.hold()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(2):
                tasks.create_task(scene.node.read(0, CLUSTER))
            await scene.source.reached.wait()
            await steps(20)
            assert scene.source.read_count == 1
            scene.source.release()
        assert scene.source.read_count == 1
        await scene.disk.active.flush()
        report = await check(RecordingFile(bytes(scene.file.disk)))
    assert (report.allocated_clusters, report.leaks, report.corruptions) == (1, 0, 0)


async def test_overlapping_fills_copy_every_cluster_once() -> None:
    async with rig() as scene:
        async with asyncio.TaskGroup() as tasks:
            for first in range(COUNT - 2):
                tasks.create_task(scene.node.read(first * CLUSTER, 3 * CLUSTER))
        await scene.compare()
        await scene.disk.active.flush()
        report = await check(RecordingFile(bytes(scene.file.disk)))
    assert (report.allocated_clusters, report.leaks, report.corruptions) == (COUNT, 0, 0)


async def test_copy_that_waits_for_a_write_leaves_it_alone() -> None:
    """The write came first, into part of a cluster, and needs the source itself."""
    async with rig() as scene:
        scene.source.hold()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(scene.write(512, 512))
            await scene.source.reached.wait()
            copy = tasks.create_task(scene.node.populate([(0, CLUSTER)]))
            await steps(20)
            assert not copy.done()
            scene.source.release()
        await scene.compare()
        await scene.stream_to_end()
        assert (await scene.whole_image()).leaks == 0


async def test_failed_copy_changes_nothing_and_the_waiting_write_goes_on() -> None:
    async with rig() as scene:
        scene.source.hold()
        scene.source.error = StorageError("the source is broken", errno=errno.EIO)
        copy = asyncio.ensure_future(scene.node.populate([(0, CLUSTER)]))
        await scene.source.reached.wait()
        whole = asyncio.ensure_future(scene.write(CLUSTER, CLUSTER))
        part = asyncio.ensure_future(scene.write(512, 512))
        await steps(20)
        scene.source.release()
        with pytest.raises(StorageError, match="broken"):
            await copy
        await whole
        with pytest.raises(StorageError, match="broken"):
            await part
        scene.source.error = None
        await scene.compare()
        job = await scene.stream_to_end()
        assert job.error is None
        assert (await scene.whole_image()).leaks == 0


# -- a write cancels the copy and fails itself --------------------------------------------------------


async def test_copy_cancelled_by_a_write_that_fails_is_made_up_for() -> None:
    """The write of a whole cluster lets the copy go, and then there is no space for it."""
    async with rig() as scene:
        scene.source.hold()
        job = await scene.disk.start(None)
        await scene.source.reached.wait()
        scene.file.fail_at(1, errno.ENOSPC)
        with pytest.raises(StorageError):
            await scene.write(0, CLUSTER)
        scene.file.work()
        scene.source.release()
        await job.wait_ended()
        assert job.error is None
        await scene.whole_image()


@pytest.mark.parametrize("step_count", range(40))
async def test_copy_cancelled_by_a_write_that_is_cancelled_is_made_up_for(step_count: int) -> None:
    """A client leaves in the middle of its write, at any moment of the stream, its last step too."""
    async with rig() as scene:
        job = await scene.disk.start(None)
        await steps(step_count)
        write = asyncio.ensure_future(scene.write(0, COUNT * CLUSTER))
        await steps(2)
        write.cancel()
        await asyncio.wait([write])
        await job.wait_ended()
        assert job.error is None
        await scene.whole_image()


async def test_write_that_cancels_a_copy_of_the_commit_and_then_fails() -> None:
    """The commit looks at the map once more; the write comes just then, and fails after that look."""
    last = (COUNT - 1) * CLUSTER
    async with rig() as scene:
        await scene.write(0, last)
        scene.source.hold()
        job = await scene.disk.start(None)
        await scene.source.reached.wait()
        async with failing_write(scene, last):  # leaves the last cluster to the commit
            scene.source.release()
            scene.source.hold()
            await steps(50)
        await scene.source.reached.wait()
        async with failing_write(scene, last):
            scene.source.release()
            await steps(200)
        await job.wait_ended()
        assert job.error is None
        await scene.whole_image()


@asynccontextmanager
async def failing_write(scene: Rig, offset: int) -> AsyncIterator[None]:
    """What a write of a whole cluster does to the queue when it fails in the end."""
    async with scene.node._queue.writing(offset, offset + CLUSTER):
        yield


# -- cancel at every await ------------------------------------------------------------------------------

Action = Callable[[Rig], Coroutine[Any, Any, Any]]

ACTIONS: dict[str, Action] = {
    "copy-on-read": lambda scene: scene.node.read(512, 2 * CLUSTER),
    "populate": lambda scene: scene.node.populate([(0, COUNT * CLUSTER)]),
    "write of a cluster": lambda scene: scene.write(CLUSTER, CLUSTER),
    "write of a part": lambda scene: scene.write(CLUSTER + 512, 512),
    "write across": lambda scene: scene.write(CLUSTER - 512, 2 * CLUSTER),
    "write zeroes": lambda scene: scene.change(scene.node.write_zeroes, 512, 2 * CLUSTER),
    "discard": lambda scene: scene.change(scene.node.discard, 0, 2 * CLUSTER),
    "flush": lambda scene: scene.node.flush(),
}


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("beside", [None, "populate", "write of a part", "discard"])
async def test_cancelled_at_every_await(name: str, beside: str | None) -> None:
    """Alone, and beside something that goes on in the same clusters."""
    for step_count in itertools.count():
        if await _cancelled_after(step_count, ACTIONS[name], ACTIONS[beside] if beside else None):
            break
    assert step_count >= 1


async def _cancelled_after(step_count: int, action: Action, beside: Action | None) -> bool:
    """Cancel `action` after so many steps; True when it had ended by itself before."""
    async with rig() as scene:
        await scene.write(0, CLUSTER)
        await scene.write(6 * CLUSTER, CLUSTER)
        other = asyncio.ensure_future(beside(scene)) if beside else None
        await steps(3)
        task = asyncio.ensure_future(action(scene))
        await steps(step_count)
        has_ended = task.done()
        task.cancel()
        await asyncio.wait([task, other] if other else [task])
        assert has_ended or task.cancelled() or task.exception() is None
        if beside is None or action is not beside:
            await scene.compare()
        await scene.disk.active.flush()
        report = await check(RecordingFile(bytes(scene.file.disk)))
        assert (report.corruptions, report.leaks) == (0, 0), report.findings
        job = await scene.stream_to_end()
        assert job.error is None
        report = await scene.whole_image()
        assert report.leaks == 0
    return has_ended


async def test_stream_cancelled_at_every_await() -> None:
    for step_count in itertools.count():
        async with rig("BB-0BBBB") as scene:
            await scene.write(512, CLUSTER)
            job = await scene.disk.start(None)
            await steps(step_count)
            has_ended = not job.can_be_cancelled
            if not has_ended:
                job.cancel()
            await job.wait_ended()
            assert job.error is None
            assert scene.disk.active.backing_filename == ("base.raw" if job.is_cancelled else None)
            await scene.compare()
            if job.is_cancelled:
                assert (await scene.stream_to_end()).error is None
            assert (await scene.whole_image()).leaks == 0
        if has_ended and not job.is_cancelled:
            break
    assert step_count > 5


# -- the end of a stream ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step_count", range(0, 60, 3))
async def test_guest_writes_the_last_cluster_as_the_stream_ends_then_switch(step_count: int) -> None:
    last = (COUNT - 1) * CLUSTER
    async with rig() as scene:
        job = await scene.disk.start(None)
        await steps(step_count)
        await scene.write(last + 512, CLUSTER - 512)
        await scene.write(last, CLUSTER)
        await job.wait_ended()
        assert (await scene.whole_image()).leaks == 0

        copy = FailingFile(name="copy.qcow2")
        await scene.disk.switch(
            await overlay(copy, scene.disk.active, len(scene.model.content), cluster_size=CLUSTER)
        )
        await scene.write(last - 512, 1024)
        await scene.compare()
        assert (await scene.stream_to_end()).error is None
        scene.file = copy
        assert (await scene.whole_image()).leaks == 0


async def test_image_is_durable_without_its_backing_when_the_job_has_ended() -> None:
    async with rig() as scene:
        await scene.write(100, 2 * CLUSTER)
        durable: list[bytes] = []
        job = await scene.disk.start(None)
        job.on_done = lambda _: durable.append(bytes(scene.file.disk))
        await job.wait_ended()
        image = await open_overlay(RecordingFile(durable[0]), None, read_only=True)
        assert image.backing_filename is None
        scene.model.check_read(0, await read_all(image))
