"""A QMP server that says what a test tells it to, for a blockctl in a process of its own."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

PROGRAM_TIMEOUT_S = 100.0

# What QMP carries is decided by the command.
Json = Any
Answer = Callable[[dict[str, Json]], list[dict[str, Json]]]

GREETING = {
    "QMP": {
        "version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": "fake"},
        "capabilities": [],
    }
}


def _nothing(_request: dict[str, Json]) -> list[dict[str, Json]]:
    return [{"return": {}}]


class FakeDaemon:
    """Answers each command with the messages that `answers[command]` makes; `{}` where there is none."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[dict[str, Json]] = []
        self._clients: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._arrived = asyncio.Condition()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[writer] = task
        try:
            await self._send(writer, GREETING)
            while line := await reader.readline():
                await self._take(writer, json.loads(line))
        except ConnectionError:
            pass  # blockctl ends as it likes
        finally:
            del self._clients[writer]
            writer.close()

    async def _take(self, writer: asyncio.StreamWriter, request: dict[str, Json]) -> None:
        async with self._arrived:
            self.requests.append(request)
            self._arrived.notify_all()
        answer = self.answers.get(request["execute"], _nothing)
        for message in answer(request):
            await self._send(writer, message if "event" in message else {**message, "id": request["id"]})

    async def _send(self, writer: asyncio.StreamWriter, message: dict[str, Json]) -> None:
        writer.write(json.dumps(message).encode() + b"\r\n")
        await writer.drain()

    async def emit(self, message: dict[str, Json]) -> None:
        """Send an event to all clients."""
        for writer in list(self._clients):
            await self._send(writer, message)

    async def arrival(self, command: str, count: int = 1) -> None:
        """Wait until a command has come `count` times."""
        async with asyncio.timeout(PROGRAM_TIMEOUT_S), self._arrived:
            await self._arrived.wait_for(lambda: self.names().count(command) >= count)

    def names(self) -> list[str]:
        return [request["execute"] for request in self.requests]

    async def drop_clients(self) -> None:
        tasks = list(self._clients.values())
        for writer in list(self._clients):
            writer.close()
        await asyncio.gather(*tasks)


@asynccontextmanager
async def fake_daemon(path: Path) -> AsyncIterator[FakeDaemon]:
    """Serve on the unix socket `path`."""
    daemon = FakeDaemon()
    server = await asyncio.start_unix_server(daemon.serve, path)
    try:
        yield daemon
    finally:
        server.close()
        await daemon.drop_clients()
        await server.wait_closed()


class Result(NamedTuple):
    """What a program printed, and how it ended."""

    status: int
    stdout: str
    stderr: str


class Program:
    """A blockctl that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, folder: Path, *arguments: str, stderr: int = asyncio.subprocess.PIPE) -> "Program":
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "blockd.cli.blockctl", *arguments),
                cwd=folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"},
            )
        )

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    async def result(self) -> Result:
        async with asyncio.timeout(PROGRAM_TIMEOUT_S):
            stdout, stderr = await self._process.communicate()
        assert self._process.returncode is not None
        return Result(self._process.returncode, stdout.decode(), (stderr or b"").decode())


async def blockctl(folder: Path, *arguments: str) -> Result:
    """Run blockctl to its end, in `folder`."""
    return await (await Program.start(folder, *arguments)).result()
