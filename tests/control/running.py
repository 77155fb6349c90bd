"""A daemon in the test's own process: real sockets and files, and its parts within reach."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from blockd.cli.options import parse_command_line
from blockd.commands.context import Services
from blockd.config import Config
from blockd.daemon import Daemon
from blockd.protocols.nbd_client import NbdClient
from blockd.qmp.server import QmpServer
from tests.qmp_client import QmpClient, QmpError

WAIT_S = 100.0


class Running(Daemon):
    """A daemon that serves QMP and NBD in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.qmp_path = folder / "qmp.sock"
        self.nbd_path = folder / "nbd.sock"
        self.services: Services
        self._stack = AsyncExitStack()

    async def _open(self, config: Config, stack: AsyncExitStack) -> tuple[Services, QmpServer[Services]]:
        self.services, qmp = await super()._open(config, stack)
        return self.services, qmp

    async def qmp(self) -> QmpClient:
        """A QMP session that ends with the daemon."""
        return await self._stack.enter_async_context(await QmpClient.connect(self.qmp_path))

    async def guest(self, export: str) -> NbdClient:
        """An NBD client that leaves before the daemon ends."""
        return await self._stack.enter_async_context(await NbdClient.connect_unix(str(self.nbd_path), export))

    async def leave(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def running(folder: Path, *arguments: str | Path) -> AsyncIterator[Running]:
    """Run a daemon with these options and sockets of its own."""
    daemon = Running(folder)
    words = ["--qmp", daemon.qmp_path, "--nbd", daemon.nbd_path, *arguments]
    config = parse_command_line([str(word) for word in words]).config
    ready = asyncio.Event()
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(daemon.run(config, lambda _: ready.set()))
        await ready.wait()
        try:
            yield daemon
            await daemon.leave()
        finally:
            daemon.stop()


async def refusal(client: QmpClient, command: str, **arguments: object) -> tuple[str, str]:
    """The class and text of the error with which a command is refused; dashes are written as underscores."""
    try:
        await client.command(command, dashed(arguments))
    except QmpError as error:
        return error.error_class, error.description
    raise AssertionError(f"{command} was not refused")


def dashed(arguments: dict[str, object]) -> dict[str, object]:
    return {name.replace("_", "-"): value for name, value in arguments.items()}


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that other tasks bring about."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  (conditions of several kinds)
            await asyncio.sleep(0.001)
