"""Asyncio as this project uses it: blocking calls in threads, shared runs, groups of tasks."""

import asyncio
import functools
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from itertools import takewhile
from typing import Any, ParamSpec, TypeVar, cast

from blockd.errors import BlockdError, StorageError

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")

# Enough for several streams whose sources are slow, each with its copies and MERGE_THREAD_COUNT merges
# (filters/blkstream.py), and for guest requests and syncs besides. Threads are started when they are needed,
# but for the first ones: the loop waits while one is started.
IO_THREAD_COUNT = 512
READY_THREAD_COUNT = 8
# A thread whose call lasts longer than this counts no more: a disk that hangs takes no other disk's threads.
LONG_CALL_S = 1.0
# With all that do not count.
IO_THREAD_COUNT_MAX = 4096
# For calls that have waited so many are started in one turn of the loop at most, and so often.
_START_COUNT_MAX = 16
_START_INTERVAL_S = 0.01


class _IoExecutor(ThreadPoolExecutor):
    """Starts threads beside those whose calls last long.

    Where no more threads can be started, calls wait for those that there are. Otherwise `submit` raises when
    the call is queued already: it would still be made, when nobody expects it.
    """

    _is_watching = False

    def _adjust_thread_count(self) -> None:
        if len(self._threads) >= self._max_workers:
            self._max_workers = min(IO_THREAD_COUNT + thread_calls.long_count(), IO_THREAD_COUNT_MAX)
        try:
            super()._adjust_thread_count()
        except (RuntimeError, MemoryError):
            if len(self._threads) < READY_THREAD_COUNT:
                raise
        if len(self._threads) >= self._max_workers:
            self._look_again(LONG_CALL_S)

    def _look_again(self, delay_s: float) -> None:
        if not self._is_watching:
            self._is_watching = True
            asyncio.get_running_loop().call_later(delay_s, self._start_more)

    def _start_more(self) -> None:
        """Start threads for calls that wait, if those before them have lasted long by now."""
        self._is_watching = False
        for _ in range(min(self._work_queue.qsize(), _START_COUNT_MAX)):
            self._adjust_thread_count()
        if self._work_queue.qsize():
            self._look_again(_START_INTERVAL_S)


def io_executor() -> ThreadPoolExecutor:
    """Make the thread pool that `in_thread` uses; the daemon sets it as its loop's default.

    Raises:   BlockdError: not even its first threads can be started.
    """
    executor = _IoExecutor(IO_THREAD_COUNT, thread_name_prefix="blockd-io")
    all_there = threading.Event()
    try:
        for _ in range(READY_THREAD_COUNT):
            executor.submit(all_there.wait)
    except (RuntimeError, MemoryError) as error:
        raise BlockdError(
            f"Could not start {READY_THREAD_COUNT} threads: the limit on processes or on memory is too low"
        ) from error
    finally:
        all_there.set()
    return executor


def run_in_loop(
    new_loop: Callable[[], asyncio.AbstractEventLoop], main: Callable[[], Coroutine[Any, Any, T]]
) -> T:
    """Run `main` to its end in an event loop of its own, and return what it returns.

    There is one run only. Each run of a uvloop opens sockets that wake it, and without them the loop can
    neither run nor be closed; `asyncio.Runner` has several, most of them to clean up.

    Raises:   what `main` raises;
              StorageError: the system lacks something for the loop;
              KeyboardInterrupt: the user has interrupted `main`, which does not handle that by itself.
    """
    tasks: list[asyncio.Task[T]] = []

    def begin() -> None:
        task = loop.create_task(main())
        tasks.append(task)
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        task.add_done_callback(lambda _: loop.stop())

    try:
        loop = new_loop()
        loop.call_soon(begin)
        loop.run_forever()
    except OSError as error:
        raise StorageError(f"Could not start the event loop: {error.strerror}") from error
    loop.close()
    if tasks[0].cancelled():
        raise KeyboardInterrupt
    return tasks[0].result()


class ThreadCalls:
    """The blocking calls that are under way, such as those of `in_thread` and `begin_in_thread`."""

    def __init__(self) -> None:
        # When each has begun, the longest first.
        self._begun: dict[object, float] = {}
        # Of those that have a thread: since when.
        self._running: dict[object, float] = {}
        self._all_over: asyncio.Future[None] | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._begun)

    def long_count(self) -> int:
        """How many have had a thread for longer than `LONG_CALL_S`."""
        latest = time.monotonic() - LONG_CALL_S
        running = list(self._running.values())  # threads may add to it meanwhile
        return sum(1 for _ in takewhile(latest.__gt__, running))

    @property
    def longest_s(self) -> float:
        """For how long the one has been under way that began first."""
        return next((time.monotonic() - begun for begun in self._begun.values()), 0.0)

    def begin(self) -> object:
        """One begins; to be told to `finish`."""
        call = object()
        self._begun[call] = time.monotonic()
        return call

    def run(self, call: object) -> None:
        """One has a thread now, which tells."""
        self._running[call] = time.monotonic()

    def finish(self, call: object) -> None:
        """One is over."""
        del self._begun[call]
        self._running.pop(call, None)
        if not self._begun and self._all_over is not None:
            self._all_over.set_result(None)
            self._all_over = None

    async def wait_over(self) -> None:
        """Return when none is under way; to be asked by one task."""
        if self._begun:
            self._all_over = asyncio.get_running_loop().create_future()
            await self._all_over


thread_calls = ThreadCalls()
# The same for what another process does for this one: it may wait for the same servers.
process_calls = ThreadCalls()


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking call in a thread and return what it returns.

    Cancel:   takes effect only when the thread has really finished, so whatever the caller
              holds (range locks, pinned clusters, buffers) stays held while the call still runs.
    """
    loop = asyncio.get_running_loop()
    under_way = thread_calls.begin()
    try:
        run = functools.partial(_run, under_way, call, *args, **kwargs)
        return await to_its_end(loop.run_in_executor(None, run))
    finally:
        thread_calls.finish(under_way)


def begin_in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
    """Begin a blocking call in a thread, which its caller may not wait for: the daemon's end does."""
    under_way = thread_calls.begin()
    try:
        loop = asyncio.get_running_loop()
        run = functools.partial(_run, under_way, call, *args, **kwargs)
        future = loop.run_in_executor(None, run)
    except BaseException:
        thread_calls.finish(under_way)
        raise

    def finish(done: asyncio.Future[T]) -> None:
        thread_calls.finish(under_way)
        if not done.cancelled():
            done.exception()  # retrieved, for nobody may be there to ask for it

    future.add_done_callback(finish)
    return future


def _run(under_way: object, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    thread_calls.run(under_way)
    return call(*args, **kwargs)


def keeping_socket_files(start: Callable[P, T]) -> Callable[P, T]:
    """Let asyncio serve on a unix socket whose file is not its own: Python 3.13 removes it at the end."""
    if sys.version_info < (3, 13):
        return start
    changed: Callable[P, T] = functools.partial(cast(Any, start), cleanup_socket=False)
    return changed


async def addresses_of(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    """The addresses of a host for TCP, each with its family.

    Not by the event loop: uvloop's threads for it end the process where none can be started.

    Raises:   OSError: there is no such host.
    """
    found = await in_thread(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    return [(family, str(address[0])) for family, _, _, _, address in found]


async def connected(host: str, port: int) -> socket.socket:
    """A TCP connection to the first address of a host that answers.

    Raises:   OSError: there is no such host, or none of its addresses answers; the error of the last one.
    """
    addresses = await addresses_of(host, port)
    while True:
        family, address = addresses.pop(0)
        with ExitStack() as undo:
            connection = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            connection.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(connection, (address, port))
            except OSError:
                if not addresses:
                    raise
                continue
            undo.pop_all()
            return connection


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


def uninterrupted(
    work: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let what was begun go on to its end, even if its caller is cancelled.

    For whatever changes the disk and then what memory says of the disk: cancelled in between, it would leave
    memory behind, and what is written next would be wrong. The caller owns the task: it waits for it.

    Cancel:   takes effect when all is done.
    """

    @functools.wraps(work)
    async def begun(*args: P.args, **kwargs: P.kwargs) -> T:
        return await to_its_end(asyncio.get_running_loop().create_task(work(*args, **kwargs)))

    return begun


# How long one goes on that has much to do on the loop; others then have their turn.
TURN_S = 0.001


class Turns:
    """The turns of somebody who has much to do on the loop."""

    def __init__(self) -> None:
        self._end = time.monotonic() + TURN_S

    async def pass_on(self) -> None:
        """Let others have their turn, if this one is over."""
        if time.monotonic() >= self._end:
            await asyncio.sleep(0)
            self._end = time.monotonic() + TURN_S


async def in_turns(make: Callable[[A], T], items: Iterable[A]) -> list[T]:
    """Make something of each item, which takes little for one of them and long for all."""
    turns = Turns()
    made: list[T] = []
    for item in items:
        await turns.pass_on()
        made.append(make(item))
    return made


async def let_go(things: list[T]) -> None:
    """Empty a list, in turns: to free many things takes nearly as long as to make them."""
    turns = Turns()
    while things:
        await turns.pass_on()
        things.pop()


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
