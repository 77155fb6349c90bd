"""Merges of what is kept, and guests that write around it meanwhile."""

import asyncio

import pytest

from tests.inline_threads import steps, use_inline_threads
from tests.stream.test_kept_parts import SETTLED_STEP_COUNT, keeping
from tests.stream.test_write_queue_schedules import CLUSTER


@pytest.fixture(autouse=True)
async def inline_threads() -> None:
    use_inline_threads()


async def test_a_write_that_cancels_what_a_merge_copies_has_its_turn() -> None:
    """It covers the one cluster, whose copy is not wanted then, and waits for that of the other once."""
    async with keeping() as scene:
        for offset in (0, CLUSTER):
            await scene.write(offset + 512, 512)
        scene.source.reached.clear()
        merge = asyncio.ensure_future(scene.node.settle())
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
