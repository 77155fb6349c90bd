"""Merges of what is staged, guests that write around it meanwhile, and streams that end too early."""

import asyncio
import errno

import pytest

from blockd.errors import StorageError
from tests.inline_threads import steps, use_inline_threads
from tests.stream.held_source import CLUSTER, rig
from tests.stream.test_staged_writes import BROKEN, SETTLED_STEP_COUNT, keeping, whole_after_stream


@pytest.fixture(autouse=True)
async def inline_threads() -> None:
    use_inline_threads()


async def test_a_write_that_cancels_what_a_merge_copies_has_its_turn() -> None:
    """It covers the one cluster, whose copy is not wanted then, and waits for that of the other once."""
    async with keeping() as scene:
        for offset in (0, CLUSTER):
            await scene.write(offset + 512, 512)
        scene.source.reached.clear()
        merge = asyncio.ensure_future(scene.node.flush_staged())
        await scene.source.reached.wait()

        async def write() -> None:
            async with scene.node._queue.writing(100, 2 * CLUSTER):
                pass

        other = asyncio.ensure_future(write())
        await steps(SETTLED_STEP_COUNT)
        assert not other.done()
        scene.source.release()
        await steps(SETTLED_STEP_COUNT)
        assert other.done()
        await merge


async def test_what_a_failed_stream_cannot_merge_stays_staged() -> None:
    """The filter stays; flushes fail until the source is well again, and the next stream serves all."""
    async with rig() as scene:
        scene.source.hold()
        scene.source.error = BROKEN
        job = await scene.disk.start(None)
        await scene.source.reached.wait()
        await scene.write(512, 512)
        scene.source.release()
        await job.wait_ended()
        assert job.error is BROKEN
        for _ in range(2):
            with pytest.raises(StorageError, match="broken"):
                await scene.node.flush()
        assert scene.node.staging_error is BROKEN
        scene.model.check_read(512, bytes(await scene.node.read(512, 512)))
        with pytest.raises(StorageError, match="broken"):
            await scene.write(1024, 512)  # nothing more is staged
        scene.source.error = None
        await whole_after_stream(scene)


async def test_a_stream_that_is_cancelled_while_the_target_is_full_loses_nothing() -> None:
    async with rig() as scene:
        scene.source.hold()
        job = await scene.disk.start(None)
        await scene.source.reached.wait()
        await scene.write(512, 512)
        scene.file.fails = lambda _: errno.ENOSPC
        scene.source.release()
        job.cancel()
        await job.wait_ended()
        with pytest.raises(StorageError):
            await scene.node.flush()
        await scene.compare()
        scene.file.work()
        await scene.node.flush()
        await scene.disk.drain()
        assert scene.disk.root.top is scene.disk.active
        await whole_after_stream(scene)
