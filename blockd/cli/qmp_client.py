"""A small QMP client: one session, commands answered in order, events kept until they are asked for."""

import asyncio
import json
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from blockd.errors import PeerError, RequestError
from blockd.wire.qmp import Value

# A server that serves one client at a time accepts the connection and then says nothing.
GREETING_TIMEOUT_S = 10.0
LINE_LENGTH_MAX = 64 << 20
# Events beyond this are dropped, the oldest first.
EVENT_COUNT_MAX = 10_000

Message = dict[str, Value]


class NoConnection(PeerError):
    """There is no session with the daemon, or there is none any more."""


class CommandFailed(RequestError):
    """The daemon refused a command, or it went wrong; `error_class` is QMP's."""

    def __init__(self, error_class: str, description: str) -> None:
        super().__init__(description)
        self.error_class = error_class


class QmpClient:
    """A session that is negotiated already; `async with await QmpClient.connect(path) as client`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
        self._reader = reader
        self._writer = writer
        self._path = path
        self._command_count = 0
        self._events: deque[Message] = deque(maxlen=EVENT_COUNT_MAX)

    @classmethod
    async def connect(cls, path: str) -> Self:
        """Connect to the unix socket `path` and negotiate: from here on no event is missed.

        Raises:   NoConnection: nobody serves QMP there.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=LINE_LENGTH_MAX)
        except OSError as error:
            reason = error.strerror or "the name is no good"
            raise NoConnection(
                f"Could not connect to '{path}': {reason}; is blockd running there?"
            ) from error
        client = cls(reader, writer, path)
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                if "QMP" not in await client._receive():
                    raise NoConnection(f"'{path}' is no QMP socket")
                await client.execute("qmp_capabilities")
        except BaseException as error:
            await client.close()
            if isinstance(error, TimeoutError):
                raise NoConnection(f"No greeting from '{path}' in {GREETING_TIMEOUT_S:.0f} s") from error
            raise
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the session; what it started goes on."""
        self._writer.close()

    async def execute(self, command: str, arguments: Mapping[str, Value] | None = None) -> Value:
        """Execute a command and return what it returns.

        Raises:   CommandFailed, NoConnection.
        """
        return await self.send({"execute": command, **({"arguments": dict(arguments)} if arguments else {})})

    async def send(self, request: Message) -> Value:
        """Send a whole request, to which an id is given, and return what the reply returns.

        Raises:   CommandFailed, NoConnection.
        """
        self._command_count += 1
        try:
            self._writer.write(json.dumps({**request, "id": self._command_count}).encode() + b"\r\n")
            await self._writer.drain()
        except OSError as error:
            raise self._closed() from error
        while True:
            message = await self._receive()
            if "event" in message:
                self._events.append(message)
            elif isinstance(failure := message.get("error"), dict):
                raise CommandFailed(str(failure.get("class")), str(failure.get("desc")))
            elif message.get("id") == self._command_count:
                return message.get("return")

    def take_events(self) -> list[Message]:
        """All events that have come and were not taken yet."""
        events = list(self._events)
        self._events.clear()
        return events

    async def wait_for_event(self, timeout_s: float) -> None:
        """Wait until there is an event to take, or the time is over.

        Raises:   NoConnection.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not self._events:
                    self._events.append(await self._receive())
        except TimeoutError:
            return

    async def _receive(self) -> Message:
        try:
            line = await self._reader.readline()
        except (OSError, ValueError) as error:
            raise self._closed() from error
        if not line.endswith(b"\n"):
            raise self._closed()
        try:
            message = json.loads(line)
        except ValueError as error:
            raise NoConnection(f"'{self._path}' does not speak QMP") from error
        if not isinstance(message, dict):
            raise NoConnection(f"'{self._path}' does not speak QMP")
        return message

    def _closed(self) -> NoConnection:
        return NoConnection(f"The connection to '{self._path}' was closed")
