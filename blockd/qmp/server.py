"""The QMP server: any number of sockets, many clients each, one command table behind all of them.

    async with QmpServer(lambda: table, bus, daemon) as server:
        await server.listen_unix("blockd.qmp")
        ...
        await server.close()

Leaving the context abruptly (an exception, a cancellation) drops the clients; `close()` first lets each
finish the command it runs and take its last replies.
"""

import asyncio
import ipaddress
import itertools
import logging
import os
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from blockd.aio import addresses_of, connected, keeping_socket_files, task_group
from blockd.errors import BlockdError, RequestError
from blockd.filenames import check_path
from blockd.qmp import stdio
from blockd.qmp.connection import Connection, Streams
from blockd.qmp.envelope import error_reply
from blockd.qmp.events import EventBus
from blockd.qmp.late_commands import LateCommands
from blockd.qmp.session import Session
from blockd.qmp.unix_socket import SocketFile
from blockd.wire.qmp.writer import pack_message

if TYPE_CHECKING:
    from blockd.qmp.table import CommandTable

logger = logging.getLogger(__name__)

# Clients of one listening socket.
CLIENT_MAX = 64
# Where anyone on the machine can connect, who does not negotiate must not hold a place for long.
TCP_NEGOTIATION_TIMEOUT_S = 10.0
# `close` waits this long for running commands and unread replies.
CLOSE_TIMEOUT_S = 10.0

Context = TypeVar("Context")


class QmpServer(Generic[Context]):
    """Listen for clients, or connect to one, and serve them until closed."""

    def __init__(
        self,
        load_commands: "Callable[[], CommandTable[Context]]",
        events: EventBus,
        context: Context,
        *,
        is_ready: asyncio.Event | None = None,
    ) -> None:
        """Commands wait until `is_ready` is set, all but those of the session itself; None: they do not."""
        self.commands = LateCommands(load_commands)
        self._is_ready = is_ready
        self._events = events
        self._context = context
        self._servers: list[asyncio.Server] = []
        self._socket_files: list[SocketFile] = []
        self._connections: dict[Connection[Context], asyncio.Task[None]] = {}
        self._client_numbers = itertools.count(1)
        self._is_closing = False
        # Set when somebody has come who gets events.
        self.is_heard = asyncio.Event()
        self._stack = AsyncExitStack()
        self._tasks: asyncio.TaskGroup

    @property
    def client_count(self) -> int:
        """How many clients are connected, over all sockets."""
        return len(self._connections)

    async def __aenter__(self) -> Self:
        self._tasks = await self._stack.enter_async_context(task_group())
        self._stack.push_async_exit(self._finish)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def listen_unix(self, path: str, *, pretty: bool = False) -> None:
        """Serve clients that connect to the unix socket `path`, a new file of mode 0600.

        Raises:   RequestError: the name is taken by a live socket or by something else, or is no good.
        """
        socket_file = await SocketFile.create(path)
        self._socket_files.append(socket_file)
        await self._listen(socket_file.listener, path, pretty)

    async def listen_tcp(self, host: str, port: int, *, pretty: bool = False) -> int:
        """Serve clients that connect to a loopback address; returns the port, which may be given as 0.

        Raises:   RequestError: the address is not a loopback address, or cannot be bound.
        """
        name = f"{host}:{port}"
        try:
            family, address = (await addresses_of(host, port))[0]
            if not ipaddress.ip_address(address).is_loopback:
                raise RequestError(
                    f"QMP listens on loopback addresses only, not on {name}: use a unix socket"
                )
            listener = socket.create_server((address, port), family=family)
        except OSError as error:
            raise RequestError(f"Failed to listen on {name}: {error.strerror}") from error
        await self._listen(listener, name, pretty)
        return int(listener.getsockname()[1])

    async def listen_fd(self, fd: int, *, pretty: bool = False) -> None:
        """Serve clients that connect to an inherited socket which listens already.

        Raises:   RequestError: it is no listening socket.
        """
        listener = _inherited(fd)
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise RequestError(f"File descriptor {fd} is not a listening socket")
        await self._listen(listener, f"fd {fd}", pretty)

    async def connect_unix(self, path: str, *, pretty: bool = False) -> None:
        """Connect to a client that listens on the unix socket `path`, and serve it.

        Raises:   RequestError: nobody listens there.
        """
        try:
            streams = await asyncio.open_unix_connection(check_path(path))
        except OSError as error:
            raise RequestError(f"Failed to connect to '{path}': {os.strerror(error.errno or 0)}") from error
        self._serve(streams, path, pretty)

    async def connect_tcp(self, host: str, port: int, *, pretty: bool = False) -> None:
        """Connect to a client that listens on a TCP port, and serve it.

        Raises:   RequestError: nobody listens there.
        """
        try:
            streams = await asyncio.open_connection(sock=await connected(host, port))
        except OSError as error:
            raise RequestError(f"Failed to connect to '{host}:{port}': {error.strerror}") from error
        self._serve(streams, f"{host}:{port}", pretty)

    async def serve_fd(self, fd: int, *, pretty: bool = False) -> None:
        """Serve the client at the other end of an inherited, connected socket.

        Raises:   RequestError: it is no socket.
        """
        connection = _inherited(fd)
        if connection.family == socket.AF_UNIX:
            streams = await asyncio.open_unix_connection(sock=connection)
        else:
            streams = await asyncio.open_connection(sock=connection)
        self._serve(streams, f"fd {fd}", pretty)

    async def serve_stdio(self, *, pretty: bool = False) -> None:
        """Serve the client that writes to our standard input and reads our standard output.

        Raises:   RequestError: they are closed, or such that nothing can be read or written.
        """
        try:
            streams = await _stdio_streams()
        except (OSError, ValueError) as error:
            reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            raise RequestError(f"Failed to use standard input and output: {reason}") from error
        self._serve(streams, "stdio", pretty)

    def stop(self) -> None:
        """Take no more clients and requests; a command that runs still gets its reply out.

        For `quit`: what was sent after it is not run.
        """
        self._stop_listening()
        for connection in self._connections:
            connection.stop()

    def drop_waiting(self) -> None:
        """Disconnect all clients, whose commands wait for a daemon that will never be ready."""
        self.stop()
        for task in self._connections.values():
            task.cancel()

    async def close(self) -> None:
        """Stop, let running commands finish and send what is queued; bounded in time.

        Needs:    not to be called by a command, for that one would be waited for.
        """
        self.stop()
        await self._remove_socket_files()
        if self._connections:
            _, late = await asyncio.wait(self._connections.values(), timeout=CLOSE_TIMEOUT_S)
            for task in late:
                task.cancel()

    async def _finish(self, kind: type[BaseException] | None, *_details: object) -> None:
        if kind is None:
            await self.close()
        else:
            self._stop_listening()
            await self._remove_socket_files()

    def _stop_listening(self) -> None:
        self._is_closing = True
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def _remove_socket_files(self) -> None:
        while self._socket_files:
            await self._socket_files.pop().remove()

    async def _listen(self, listener: socket.socket, name: str, pretty: bool) -> None:
        clients: set[Connection[Context]] = set()
        accept = partial(self._accept, clients, name, pretty)
        if listener.family == socket.AF_UNIX:
            server = await keeping_socket_files(asyncio.start_unix_server)(accept, sock=listener)
        else:
            server = await asyncio.start_server(accept, sock=listener)
        self._servers.append(server)

    def _accept(
        self,
        clients: set[Connection[Context]],
        name: str,
        pretty: bool,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if self._is_closing:
            writer.transport.abort()
            return
        if len(clients) >= CLIENT_MAX:
            logger.warning("QMP client refused, socket=%s has %d clients", name, CLIENT_MAX)
            error = RequestError(
                f"{CLIENT_MAX} clients are connected to this socket: close one and try again"
            )
            writer.write(pack_message(error_reply(None, error)))
            writer.close()
            return
        is_tcp = writer.get_extra_info("socket").family != socket.AF_UNIX
        timeout_s = TCP_NEGOTIATION_TIMEOUT_S if is_tcp else None
        connection = self._serve(
            (reader, writer), name, pretty, negotiation_timeout_s=timeout_s, strict=is_tcp
        )
        clients.add(connection)
        self._connections[connection].add_done_callback(lambda _: clients.remove(connection))

    def _serve(
        self,
        streams: Streams,
        name: str,
        pretty: bool,
        *,
        negotiation_timeout_s: float | None = None,
        strict: bool = False,
    ) -> Connection[Context]:
        connection = Connection(
            Session(self.commands, self._context, self.is_heard.set, self._is_ready),
            self._events,
            streams,
            name=f"{name}#{next(self._client_numbers)}",
            pretty=pretty,
            negotiation_timeout_s=negotiation_timeout_s,
            strict=strict,
        )
        self._connections[connection] = self._tasks.create_task(self._supervise(connection))
        return connection

    async def _supervise(self, connection: Connection[Context]) -> None:
        logger.debug("QMP client connected: client=%s", connection.name)
        try:
            await connection.run()
        except BlockdError as error:
            logger.warning("QMP client let go: client=%s error=%s", connection.name, error)
        except Exception:
            logger.exception("QMP connection failed: client=%s", connection.name)
        finally:
            del self._connections[connection]
            logger.debug("QMP client gone: client=%s", connection.name)


def _inherited(fd: int) -> socket.socket:
    try:
        inherited = socket.socket(fileno=fd)
    except OSError as error:
        raise RequestError(
            f"File descriptor {fd} is not a socket: {os.strerror(error.errno or 0)}"
        ) from error
    inherited.setblocking(False)
    return inherited


async def _stdio_streams() -> Streams:
    loop = asyncio.get_running_loop()
    reader, unread = asyncio.StreamReader(), asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(unread)
    source, target = stdio.readable(0), stdio.writable(1)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(source, "rb"))
    transport, _ = await loop.connect_write_pipe(lambda: protocol, os.fdopen(target, "wb"))
    return reader, asyncio.StreamWriter(transport, protocol, None, loop)
