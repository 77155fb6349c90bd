"""Asyncio as this project uses it: blocking calls in threads, shared runs, groups of tasks."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Enough for several streams whose sources are slow, each with its copies and MERGE_THREAD_COUNT merges
# (filters/blkstream.py), and for guest requests and syncs besides. Threads are started when they are needed,
# but for the first ones: the loop waits while one is started.
IO_THREAD_COUNT = 512
READY_THREAD_COUNT = 8


def io_executor() -> ThreadPoolExecutor:
    """Make the thread pool that `in_thread` uses; the daemon sets it as its loop's default."""
    executor = ThreadPoolExecutor(IO_THREAD_COUNT, thread_name_prefix="blockd-io")
    all_there = threading.Barrier(READY_THREAD_COUNT)
    for _ in range(READY_THREAD_COUNT):
        executor.submit(all_there.wait)
    return executor


class ThreadCalls:
    """How many calls of `in_thread` are under way."""

    def __init__(self) -> None:
        self.count = 0


thread_calls = ThreadCalls()


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking call in a thread and return what it returns.

    Cancel:   takes effect only when the thread has really finished, so whatever the caller
              holds (range locks, pinned clusters, buffers) stays held while the call still runs.
    """
    loop = asyncio.get_running_loop()
    thread_calls.count += 1
    try:
        return await to_its_end(loop.run_in_executor(None, lambda: call(*args, **kwargs)))
    finally:
        thread_calls.count -= 1


async def to_its_end(future: asyncio.Future[T]) -> T:
    """Wait for what cannot be called back.

    Cancel:   takes effect when the future is done.
    """
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await _settled(future)
        raise


async def _settled(future: asyncio.Future[T]) -> None:
    """Wait until `future` is done, through any number of further cancellations."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()  # retrieved: the cancellation is what the caller reports


class Coalesced:
    """Run an operation so that every caller is covered by a run that started after its call.

    Callers that come while one run is under way share the next one: a hundred guests that flush
    at once cost two syncs.
    """

    def __init__(self, operation: Callable[[], Awaitable[None]]) -> None:
        self._operation = operation
        self._lock = asyncio.Lock()
        self._started = 0
        self._succeeded = 0

    async def __call__(self) -> None:
        ticket = self._started
        async with self._lock:
            if self._succeeded > ticket:
                return
            self._started += 1
            started = self._started
            await self._operation()
            self._succeeded = started


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """An `asyncio.TaskGroup` that raises the first error itself, not a group of one.

    Cancel:   when an error and a cancellation meet, the error is raised (as by TaskGroup on 3.11).
    """
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
