"""A QMP client for tests: sends commands, keeps the events, hides nothing.

It is separate from the product's client on purpose: a mistake made twice is not seen.
"""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# What QMP carries is decided by the command, and tests say what they expect of it.
Json = Any

LINE_MAX = 64 << 20
REPLY_TIMEOUT_S = 100.0


class QmpError(Exception):
    """The error reply to a command."""

    def __init__(self, error_class: str, description: str) -> None:
        super().__init__(f"{error_class}: {description}")
        self.error_class = error_class
        self.description = description


class QmpClient:
    """One QMP session over a unix socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._next_id = 0
        self.greeting: dict[str, Json] = {}
        # All events seen so far, in order; `event()` takes from `_unseen`.
        self.events: list[dict[str, Json]] = []
        self._unseen: list[dict[str, Json]] = []

    @classmethod
    async def connect(cls, path: Path | str, *, negotiate: bool = True) -> Self:
        """Connect, read the greeting, and unless told otherwise negotiate."""
        reader, writer = await asyncio.open_unix_connection(path, limit=LINE_MAX)
        client = cls(reader, writer)
        client.greeting = await client.receive()
        if negotiate:
            await client.command("qmp_capabilities")
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        self._writer.close()
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self) -> dict[str, Json]:
        """The next line, whatever it is.

        Raises:   EOFError: the daemon closed the session.
        """
        line = await asyncio.wait_for(self._reader.readline(), REPLY_TIMEOUT_S)
        if not line:
            raise EOFError("the QMP session was closed")
        message: dict[str, Json] = json.loads(line)
        if "event" in message:
            self.events.append(message)
            self._unseen.append(message)
        return message

    async def command(self, command: str, arguments: Mapping[str, Json] | None = None, **more: Json) -> Json:
        """Execute a command and return what it returns; arguments with dashes go into the mapping.

        Raises:   QmpError: the command failed.
        """
        self._next_id += 1
        given = {**(arguments or {}), **more}
        request = {"execute": command, "id": self._next_id} | ({"arguments": given} if given else {})
        await self.send(json.dumps(request).encode() + b"\r\n")
        while True:
            reply = await self.receive()
            if reply.get("id") == self._next_id:
                break
        if "error" in reply:
            raise QmpError(reply["error"]["class"], reply["error"]["desc"])
        return reply["return"]

    async def event(self, name: str, **data: Json) -> dict[str, Json]:
        """Wait for an event of this name and with at least this data; returns its data.

        Every event is found once, also one that came before this call; others are left for later calls.
        """
        position = 0
        while True:
            while position == len(self._unseen):
                await self.receive()
            message = self._unseen[position]
            found: dict[str, Json] = message.get("data", {})
            if message["event"] == name and data.items() <= found.items():
                del self._unseen[position]
                return found
            position += 1

    def event_names(self) -> list[str]:
        """The names of all events so far, job status changes as in ``JOB_STATUS_CHANGE:created``."""
        return [
            f"{event['event']}:{event['data']['status']}"
            if event["event"] == "JOB_STATUS_CHANGE"
            else event["event"]
            for event in self.events
        ]
