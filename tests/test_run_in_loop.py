"""The one run of the daemon's event loop: how it ends."""

import asyncio
import os
import signal

import pytest
import uvloop

from blockd.aio import run_in_loop
from blockd.errors import RequestError, StorageError


def test_what_main_raises_is_raised() -> None:
    async def main() -> None:
        await asyncio.sleep(0)
        raise RequestError("no")

    with pytest.raises(RequestError, match="no"):
        run_in_loop(uvloop.new_event_loop, main)


def test_interrupted_main_is_cancelled() -> None:
    seen: list[str] = []

    async def main() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        run_in_loop(uvloop.new_event_loop, main)
    assert seen == ["cleaned up"]


def test_no_loop_is_one_line() -> None:
    def fail() -> asyncio.AbstractEventLoop:
        raise OSError(24, "Too many open files")

    async def main() -> None:
        raise AssertionError("there is no loop")

    with pytest.raises(StorageError, match="Could not start the event loop: Too many open files"):
        run_in_loop(fail, main)
