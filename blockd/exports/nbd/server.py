"""The NBD server: listeners, the table of exports, and the limit on connections."""

import asyncio
import contextlib
import logging
import socket
from types import TracebackType
from typing import Self

from blockd.errors import ErrorKind, RequestError
from blockd.exports.nbd.connection import Connection
from blockd.exports.nbd.export import Export
from blockd.exports.nbd.listeners import Listener, Place, listen_fd, listen_tcp, listen_unix
from blockd.exports.nbd.memory import RequestMemory
from blockd.exports.nbd.polling import POLL_S, Polling
from blockd.units import KIB, MIB
from blockd.wire.nbd.constants import NAME_LENGTH_MAX

log = logging.getLogger(__name__)

CONNECTION_COUNT_MAX = 100
# A client that has left frees its place, though its disk may hang and never answer what is under way. For all
# such clients so many requests may be under way, each of which may keep a thread, and so much may be held.
LEFT_REQUEST_COUNT_MAX = 1000
LEFT_LENGTH_MAX = 64 * MIB
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
        is_ready: asyncio.Event | None = None,
    ) -> None:
        self.exports: dict[str, Export] = {}
        self._by_id: dict[str, Export] = {}
        self.max_connections = max_connections
        self._haggling_limit_s = haggling_limit_s
        self._tasks = tasks
        # Until it is set clients may connect, and wait for the greeting; None: at once.
        self._is_ready = is_ready
        self._memory = RequestMemory(max_connections)
        self._polling = Polling(poll_s)
        self._slots = asyncio.Semaphore(max_connections)
        # Those whose client has left: with a slot still, in that order, and without one.
        self._leaving: dict[Connection, None] = {}
        self._left: set[Connection] = set()
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
    def places(self) -> list[Place]:
        """Where the server listens, but for the sockets that it inherited."""
        return [listener.place for listener in self._listeners if listener.place is not None]

    # -- listening ----------------------------------------------------------------------------

    async def listen_unix(self, path: str) -> None:
        """Serve clients on a unix socket; raises RequestError as the function of that name."""
        self._listen(await listen_unix(path))

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
        if self._is_ready is not None:
            # Not accepted yet, they take no slot, and the time that they have to choose does not run.
            await self._is_ready.wait()
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
            with contextlib.suppress(OSError):  # it is only for speed
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_SIZE)
        name = str(self._accepted_count)
        connection = Connection(
            self.exports, self._memory, self._polling, name, lambda: self._note_left(connection)
        )
        task = self._tasks.create_task(connection.run(sock, self._haggling_limit_s))
        self._connections[connection] = task
        task.add_done_callback(lambda _: self._forget(connection))

    def _note_left(self, connection: Connection) -> None:
        """The client of a connection is gone; requests of its may be under way still."""
        if connection in self._connections:  # else nothing was under way
            self._leaving[connection] = None
            self._free_slots()

    def _free_slots(self) -> None:
        """Let others have the slots of clients that have left, unless too much is under way for such."""
        if not self._leaving:
            return
        request_count = sum(left.request_count for left in self._left)
        held = sum(left.held for left in self._left)
        for connection in [*self._leaving]:
            request_count += connection.request_count
            held += connection.held
            if request_count > LEFT_REQUEST_COUNT_MAX or held > LEFT_LENGTH_MAX:
                return
            del self._leaving[connection]
            self._left.add(connection)
            self._slots.release()

    def _forget(self, connection: Connection) -> None:
        del self._connections[connection]
        if connection in self._left:
            self._left.remove(connection)
        else:
            self._leaving.pop(connection, None)
            self._slots.release()
        self._free_slots()

    # -- exports ------------------------------------------------------------------------------

    def add_export(self, export: Export) -> None:
        """Offer an export from now on.

        Raises:   RequestError: name or id in use, name too long, or writable on a read-only node.
        """
        if export.export_id in self._by_id:
            raise RequestError(f"Block export id '{export.export_id}' is already in use")
        if export.name in self.exports:
            raise RequestError(f"NBD server already has export named '{export.name}'")
        for what, text in (("export name", export.name), ("description", export.description)):
            if len(text.encode()) > NAME_LENGTH_MAX:
                raise RequestError(f"{what} '{text[:40]}…' too long: at most {NAME_LENGTH_MAX} bytes")
        if export.writable and export.root.top.read_only:
            raise RequestError("Cannot export read-only node as writable", kind=ErrorKind.READ_ONLY)
        self.exports[export.name] = self._by_id[export.export_id] = export

    async def remove_export(self, export_id: str, force: bool = False) -> None:
        """Withdraw an export and wait until its clients are gone; see `withdraw`."""
        await _all_done(self.withdraw(export_id, force=force))

    def withdraw(self, export_id: str, *, force: bool) -> list[asyncio.Task[None]]:
        """Offer an export no longer; with `force` its clients are disconnected, otherwise there may be none.

        Tells what has to end until nothing of them is left: requests that are under way are finished.

        Raises:   RequestError: no such export, or clients are connected to it and not `force`.
        """
        export = self._export(export_id)
        connections = [connection for connection in self._connections if connection.export is export]
        if connections and not force:
            raise RequestError(f"export '{export_id}' still in use")
        del self.exports[export.name], self._by_id[export_id]
        return self._stopped(connections)

    def _export(self, export_id: str) -> Export:
        if export_id not in self._by_id:
            raise RequestError(f"Export '{export_id}' is not found")
        return self._by_id[export_id]

    async def close(self) -> None:
        """Stop listening and disconnect all clients; on return nothing of them is left. Idempotent."""
        listeners, self._listeners = self._listeners, {}
        for listener, task in listeners.items():
            task.cancel()
            await asyncio.wait([task])
            await listener.close()
        await _all_done(self._stopped(list(self._connections)))

    def _stopped(self, connections: list[Connection]) -> list[asyncio.Task[None]]:
        tasks = [self._connections[connection] for connection in connections]
        for connection in connections:
            connection.stop()
        return tasks


async def _all_done(tasks: list[asyncio.Task[None]]) -> None:
    if tasks:
        await asyncio.wait(tasks)
