"""A running server with the toy commands, on a unix socket."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockd.qmp.server import QmpServer
from tests.qmp.toys import TOYS, ToyContext


@pytest.fixture
def toy() -> ToyContext:
    return ToyContext()


@pytest.fixture
async def server(toy: ToyContext, caplog: pytest.LogCaptureFixture) -> AsyncIterator[QmpServer[ToyContext]]:
    async with QmpServer(lambda: TOYS, toy.bus, toy) as server:
        yield server
    assert "QMP connection failed" not in caplog.text


@pytest.fixture
async def qmp_path(server: QmpServer[ToyContext], tmp_path: Path) -> str:
    """The socket the server listens on."""
    path = str(tmp_path / "qmp.sock")
    await server.listen_unix(path)
    return path
