"""The NBD server: listeners, the table of exports, and the limit on connections."""

import asyncio
import logging
import socket
from types import TracebackType
from typing import Self

from blockd.errors import ErrorKind, RequestError
from blockd.exports.nbd.connection import Connection
from blockd.exports.nbd.export import Export
from blockd.exports.nbd.listeners import Listener, listen_fd, listen_tcp, listen_unix
from blockd.exports.nbd.memory import RequestMemory
from blockd.exports.nbd.polling import POLL_S, Polling
from blockd.units import KIB
from blockd.wire.nbd.constants import NAME_LENGTH_MAX

log = logging.getLogger(__name__)

CONNECTION_COUNT_MAX = 100
HAGGLING_LIMIT_S = 10.0
# When a client cannot be accepted (no file descriptors left, say), trying again at once would spin.
_ACCEPT_RETRY_S = 1.0
# What the kernel takes of unsent replies (it counts its own overhead, and allows for that twice this). By
# default half as much: large reads then wait for the client more often than they copy. With much more the
# bytes are out of the processor's cache again before the client takes them.
SEND_BUFFER_SIZE = 208 * KIB


class NbdServer:
    """Serves exports to any number of listeners; at the connection limit further clients wait.

    Every task it starts belongs to the task group handed in, whose owner calls `close` (or uses
    ``async with``) before leaving that group.
    """

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        *,
        max_connections: int = CONNECTION_COUNT_MAX,
        haggling_limit_s: float = HAGGLING_LIMIT_S,
        poll_s: float = POLL_S,
    ) -> None:
        self.exports: dict[str, Export] = {}
        self.max_connections = max_connections
        self._haggling_limit_s = haggling_limit_s
        self._tasks = tasks
        self._memory = RequestMemory()
        self._polling = Polling(poll_s)
        self._slots = asyncio.Semaphore(max_connections)
        self._listeners: dict[Listener, asyncio.Task[None]] = {}
        self._connections: dict[Connection, asyncio.Task[None]] = {}
        self._accepted_count = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def connection_count(self) -> int:
        """How many clients are being served, haggling ones included."""
        return len(self._connections)

    @property
    def addresses(self) -> list[str]:
        """Where clients reach the server, as NBD URIs."""
        return [listener.address for listener in self._listeners]

    @property
    def sockets(self) -> list[socket.socket]:
        """The listening sockets that the server has made itself, not those that it inherited."""
        return [listener.sock for listener in self._listeners if not listener.is_inherited]

    # -- listening ----------------------------------------------------------------------------

    def listen_unix(self, path: str) -> None:
        """Serve clients on a unix socket; raises RequestError as the function of that name."""
        self._listen(listen_unix(path))

    async def listen_tcp(self, host: str, port: int) -> None:
        """Serve clients on loopback addresses; port 0 picks a free one (see `addresses`)."""
        for listener in await listen_tcp(host, port):
            self._listen(listener)

    def listen_fd(self, fd: int) -> None:
        """Serve clients on an inherited listening socket, which belongs to the server from now on."""
        self._listen(listen_fd(fd))

    def _listen(self, listener: Listener) -> None:
        self._listeners[listener] = self._tasks.create_task(self._accept_all(listener))
        log.info("NBD server listens: address=%s", listener.address)

    async def _accept_all(self, listener: Listener) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener.sock)
            except OSError as error:
                log.warning("NBD client could not be accepted: address=%s error=%s", listener.address, error)
                await asyncio.sleep(_ACCEPT_RETRY_S)
                continue
            try:
                await self._slot()
            except asyncio.CancelledError:
                sock.close()
                raise
            self._connect(sock)

    async def _slot(self) -> None:
        if self._slots.locked():
            log.warning("NBD connection limit reached, new clients wait: max=%d", self.max_connections)
        await self._slots.acquire()

    def _connect(self, sock: socket.socket) -> None:
        self._accepted_count += 1
        if sock.family == socket.AF_UNIX:  # the others size themselves
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_SIZE)
        connection = Connection(self.exports, self._memory, self._polling, str(self._accepted_count))
        task = self._tasks.create_task(connection.run(sock, self._haggling_limit_s))
        self._connections[connection] = task
        task.add_done_callback(lambda _: self._forget(connection))

    def _forget(self, connection: Connection) -> None:
        del self._connections[connection]
        self._slots.release()

    # -- exports ------------------------------------------------------------------------------

    def add_export(self, export: Export) -> None:
        """Offer an export from now on.

        Raises:   RequestError: name or id in use, name too long, or writable on a read-only node.
        """
        if any(export.export_id == other.export_id for other in self.exports.values()):
            raise RequestError(f"Block export id '{export.export_id}' is already in use")
        if export.name in self.exports:
            raise RequestError(f"NBD server already has export named '{export.name}'")
        for what, text in (("export name", export.name), ("description", export.description)):
            if len(text.encode()) > NAME_LENGTH_MAX:
                raise RequestError(f"{what} '{text[:40]}…' too long: at most {NAME_LENGTH_MAX} bytes")
        if export.writable and export.root.top.read_only:
            raise RequestError("Cannot export read-only node as writable", kind=ErrorKind.READ_ONLY)
        self.exports[export.name] = export

    async def remove_export(self, export_id: str, force: bool = False) -> None:
        """Withdraw an export; with `force` its clients are disconnected, otherwise there may be none.

        Raises:   RequestError: no such export, or clients are connected to it and not `force`.
        """
        export = self._export(export_id)
        connections = [connection for connection in self._connections if connection.export is export]
        if connections and not force:
            raise RequestError(f"export '{export_id}' still in use")
        del self.exports[export.name]
        await self._disconnect(connections)

    def _export(self, export_id: str) -> Export:
        for export in self.exports.values():
            if export.export_id == export_id:
                return export
        raise RequestError(f"Export '{export_id}' is not found")

    async def close(self) -> None:
        """Stop listening and disconnect all clients; on return nothing of them is left. Idempotent."""
        listeners, self._listeners = self._listeners, {}
        for listener, task in listeners.items():
            task.cancel()
            await asyncio.wait([task])
            listener.close()
        await self._disconnect(list(self._connections))

    async def _disconnect(self, connections: list[Connection]) -> None:
        tasks = [self._connections[connection] for connection in connections]
        for connection in connections:
            connection.stop()
        if tasks:
            await asyncio.wait(tasks)
