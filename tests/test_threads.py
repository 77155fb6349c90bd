"""The threads that make blocking calls: calls that hang take nobody else's."""

import asyncio
import gc
import os
import threading
from collections.abc import Iterator

import pytest

from blockd import aio
from blockd.aio import ThreadCalls, begin_in_thread, in_thread, io_executor, thread_calls

HANGING_COUNT = 3 * aio.READY_THREAD_COUNT


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What hangs does so until this is set."""
    monkeypatch.setattr(aio, "IO_THREAD_COUNT", aio.READY_THREAD_COUNT)
    monkeypatch.setattr(aio, "LONG_CALL_S", 0.01)
    answer = threading.Event()
    yield answer
    answer.set()


async def test_calls_that_hang_take_no_threads_of_others(answer: threading.Event) -> None:
    asyncio.get_running_loop().set_default_executor(io_executor())
    hanging = [asyncio.create_task(in_thread(answer.wait)) for _ in range(HANGING_COUNT)]
    while thread_calls.count < HANGING_COUNT:  # noqa: ASYNC110  (they begin in turns of the loop)
        await asyncio.sleep(0)
    async with asyncio.timeout(100):
        assert await in_thread(lambda: "another") == "another"
    assert thread_calls.count == HANGING_COUNT
    answer.set()
    await asyncio.gather(*hanging)


async def test_there_is_a_limit_to_that(answer: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "IO_THREAD_COUNT_MAX", aio.READY_THREAD_COUNT + 2)
    executor = io_executor()
    asyncio.get_running_loop().set_default_executor(executor)
    hanging = [asyncio.create_task(in_thread(answer.wait)) for _ in range(HANGING_COUNT)]
    async with asyncio.timeout(100):
        while len(executor._threads) < aio.IO_THREAD_COUNT_MAX:  # noqa: ASYNC110  (the executor's own matter)
            await asyncio.sleep(0)
    answer.set()
    await asyncio.gather(*hanging)
    assert len(executor._threads) == aio.IO_THREAD_COUNT_MAX


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_calls_that_wait_for_a_thread_do_not_count_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: they keep no thread from others, and more threads make no disk faster."""
    clock, calls = Clock(), ThreadCalls()
    monkeypatch.setattr(aio, "time", clock)
    first, second = calls.begin(), calls.begin()
    clock.now += 2 * aio.LONG_CALL_S
    assert (calls.count, calls.longest_s, calls.long_count()) == (2, 2 * aio.LONG_CALL_S, 0)
    calls.run(first)
    calls.run(second)
    clock.now += aio.LONG_CALL_S / 2
    assert calls.long_count() == 0
    clock.now += aio.LONG_CALL_S
    assert calls.long_count() == 2
    calls.finish(first)
    assert (calls.count, calls.long_count()) == (1, 1)


async def test_calls_are_known_to_run_when_they_do(answer: threading.Event) -> None:
    for begin in (in_thread, begin_in_thread):
        executor = io_executor()
        asyncio.get_running_loop().set_default_executor(executor)
        waiting = [asyncio.ensure_future(begin(answer.wait)) for _ in range(aio.READY_THREAD_COUNT + 1)]
        async with asyncio.timeout(100):
            while len(thread_calls._running) < aio.READY_THREAD_COUNT:  # noqa: ASYNC110  (threads do it)
                await asyncio.sleep(0)
        answer.set()
        await asyncio.gather(*waiting)
        answer.clear()
        assert not thread_calls._running


async def test_a_call_that_nobody_waits_for_may_fail() -> None:
    """A look at a file, say, that is closed when the thread comes to it; nobody wants to know."""
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    call = begin_in_thread(os.fstat, -1)
    await asyncio.wait([call])
    del call
    gc.collect()
    assert told == []
