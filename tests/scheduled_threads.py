"""Threads whose order is decided by a test, or drawn by a seed: in place of the running loop's executor.

A call in a thread has two moments: when it *acts*, and when the loop *hears* of it, which may be much
later. What runs on the loop in between finds the world changed and the caller not told of it yet.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Call:
    """One call on its way."""

    def __init__(self, act: Callable[[], Any], future: "asyncio.Future[Any]") -> None:
        self._act = act
        self._future = future
        self.has_acted = False
        self._result: Any = None
        self._error: BaseException | None = None

    def act(self) -> None:
        """Do what the thread does."""
        assert not self.has_acted, "a thread runs once"
        self.has_acted = True
        try:
            self._result = self._act()
        except BaseException as error:
            self._error = error

    def tell(self) -> None:
        """Let the loop hear that it is done."""
        if self._future.done():
            return  # the loop is being closed
        if self._error is not None:
            self._future.set_exception(self._error)
        else:
            self._future.set_result(self._result)


class Threads:
    """Calls wait in `calls`, in the order they were made, for a test to let them act and be heard."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def submit(self, executor: object, act: Callable[..., Any], *arguments: object) -> "asyncio.Future[Any]":
        """Stand in for `loop.run_in_executor`."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.calls.append(Call(partial(act, *arguments), future))
        return future

    def finish(self, call: Call) -> None:
        """Let a call act, unless it has, and be heard."""
        self.calls.remove(call)
        if not call.has_acted:
            call.act()
        call.tell()

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Let all calls act and be heard until a coroutine is done."""
        task = asyncio.create_task(coroutine)
        await self.run_all(task)
        return task.result()

    async def run_others(self, held: Call, *tasks: "asyncio.Task[Any]") -> None:
        """Let all calls but one act and be heard until the tasks are done."""
        self.calls.remove(held)
        await self.run_all(*tasks)
        self.calls.append(held)

    async def run_all(self, *tasks: "asyncio.Task[Any]") -> None:
        """Let all calls act and be heard, those too that follow from them, until the tasks are done."""
        idle = 0
        while (self.calls or not all(task.done() for task in tasks)) and idle < 1000:
            await asyncio.sleep(0)
            idle = 0 if self.calls else idle + 1
            if self.calls:
                self.finish(self.calls[0])
        assert all(task.done() for task in tasks), "something waits for what never comes"


class RandomThreads(Threads):
    """Calls act and are heard in any order, at most one of both in a turn of the loop."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._random = rng.random
        self._is_turning = False

    def submit(self, executor: object, act: Callable[..., Any], *arguments: object) -> "asyncio.Future[Any]":
        future = super().submit(executor, act)
        if not self._is_turning:
            self._is_turning = True
            asyncio.get_running_loop().call_soon(self._turn)
        return future

    def _turn(self) -> None:
        calls = self.calls
        index = int(self._random() * (len(calls) + 1))  # sometimes nothing happens
        if index < len(calls):
            if calls[index].has_acted:
                calls.pop(index).tell()
            else:
                calls[index].act()
        self._is_turning = bool(calls)
        if calls:
            asyncio.get_running_loop().call_soon(self._turn)


@contextmanager
def scheduled(threads: Threads) -> Iterator[Threads]:
    """Inside, these are the threads of the running loop."""
    loop = asyncio.get_running_loop()
    loop.run_in_executor = threads.submit  # type: ignore[method-assign, assignment]
    try:
        yield threads
    finally:
        del loop.run_in_executor
