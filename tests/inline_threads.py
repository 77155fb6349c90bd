"""Threads that are none: what goes to the executor runs at once, so that schedules repeat exactly."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _InlineExecutor(ThreadPoolExecutor):
    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(call(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def use_inline_threads() -> None:
    """Make the running loop's executor run everything in the caller."""
    asyncio.get_running_loop().set_default_executor(_InlineExecutor(1))


@contextmanager
def immediate_threads() -> Iterator[None]:
    """Inside, what goes to the running loop's executor is done on return: nobody waits, not even one turn."""
    loop = asyncio.get_running_loop()

    def run_at_once(executor: object, call: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        future: asyncio.Future[T] = loop.create_future()
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    loop.run_in_executor = run_at_once  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del loop.run_in_executor


async def steps(count: int) -> None:
    """Let the event loop go round `count` times."""
    for _ in range(count):
        await asyncio.sleep(0)
