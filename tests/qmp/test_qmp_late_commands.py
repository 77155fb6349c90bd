"""Commands that take long to load: everybody is greeted, and requests are answered later."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockd.qmp.server import QmpServer
from blockd.qmp.table import CommandTable
from tests.qmp.toys import TOYS, ToyContext
from tests.qmp_client import QmpClient

LOAD_TIMEOUT_S = 100.0


class SlowTable:
    """Loads only when it is allowed to."""

    def __init__(self) -> None:
        self.may_load = threading.Event()
        self.load_count = 0

    def load(self) -> CommandTable[ToyContext]:
        self.load_count += 1
        assert self.may_load.wait(LOAD_TIMEOUT_S)
        return TOYS


@pytest.fixture
async def slow() -> AsyncIterator[SlowTable]:
    slow = SlowTable()
    yield slow
    slow.may_load.set()


async def test_greeting_does_not_wait_and_all_requests_are_answered(
    slow: SlowTable, toy: ToyContext, tmp_path: Path
) -> None:
    path = str(tmp_path / "q")
    async with QmpServer(slow.load, toy.bus, toy) as server:
        await server.listen_unix(path)
        # `connect` returns with the greeting.
        early = [await QmpClient.connect(path, negotiate=False) for _ in range(3)]
        replies = [asyncio.create_task(client.command("qmp_capabilities")) for client in early]
        while not slow.load_count:  # noqa: ASYNC110 (a thread counts)
            await asyncio.sleep(0)
        late = await QmpClient.connect(path, negotiate=False)
        assert "QMP" in late.greeting
        assert not any(reply.done() for reply in replies)
        slow.may_load.set()
        assert await asyncio.gather(*replies) == [{}, {}, {}]
        await late.command("qmp_capabilities")
        names = [command["name"] for command in await late.command("query-commands")]
        assert {"ring", "query-version"} <= set(names)
        assert slow.load_count == 1
        for client in (*early, late):
            await client.close()


async def test_a_client_that_leaves_meanwhile_takes_nothing_from_the_others(
    slow: SlowTable, toy: ToyContext, tmp_path: Path
) -> None:
    path = str(tmp_path / "q")
    async with QmpServer(slow.load, toy.bus, toy) as server:
        await server.listen_unix(path)
        rude = await QmpClient.connect(path, negotiate=False)
        await rude.send(b'{"execute": "qmp_capabilities"}')
        while not slow.load_count:  # noqa: ASYNC110 (a thread counts)
            await asyncio.sleep(0)
        await rude.close()
        polite = await QmpClient.connect(path, negotiate=False)
        reply = asyncio.create_task(polite.command("qmp_capabilities"))
        await asyncio.sleep(0)
        slow.may_load.set()
        assert await reply == {}
        await polite.close()
