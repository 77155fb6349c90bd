"""The daemon runs on uvloop, whose transports differ in the small print: the same tests once more on it."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from blockd.qmp.server import QmpServer
from tests.qmp import test_qmp_server, test_qmp_session, test_qmp_transports
from tests.qmp.toys import TOYS, ToyContext

Scenario = Callable[..., Awaitable[None]]
FIXTURES = {"qmp_path", "server", "toy", "tmp_path"}
SCENARIOS: list[Scenario] = [
    test
    for module in (test_qmp_session, test_qmp_server, test_qmp_transports)
    for name, test in vars(module).items()
    if name.startswith("test_") and inspect.iscoroutinefunction(test)
    if inspect.signature(test).parameters.keys() <= FIXTURES
]


async def play(scenario: Scenario, tmp_path: Path) -> None:
    toy = ToyContext()
    async with QmpServer(lambda: TOYS, toy.bus, toy) as server:
        qmp_path = str(tmp_path / "qmp.sock")
        await server.listen_unix(qmp_path)
        fixtures = {"qmp_path": qmp_path, "server": server, "toy": toy, "tmp_path": tmp_path}
        await scenario(**{name: fixtures[name] for name in inspect.signature(scenario).parameters})


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_on_uvloop(scenario: Scenario, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(play(scenario, tmp_path))
    assert "QMP connection failed" not in caplog.text
