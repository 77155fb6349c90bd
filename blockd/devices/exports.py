"""Exports: disks offered over NBD, and the server that offers them."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import NamedTuple

from blockd.aio import task_group, uninterrupted
from blockd.block.node import BlockNode
from blockd.block.permissions import CONSISTENT_READ, EVERYTHING, RESIZE, WRITE, Permission
from blockd.devices.device import Device, Devices
from blockd.drivers.permissions import Claim
from blockd.errors import ErrorKind, RequestError
from blockd.exports.nbd.export import Export
from blockd.exports.nbd.polling import POLL_S
from blockd.exports.nbd.server import CONNECTION_COUNT_MAX, NbdServer
from blockd.jobs.manager import is_well_formed


class Offer(NamedTuple):
    """An export and the disk behind it."""

    export: Export
    device: Device


class Exports:
    """The NBD server, when it runs, and what it exports."""

    def __init__(
        self,
        devices: Devices,
        tasks: asyncio.TaskGroup,
        on_deleted: Callable[[str], None],
        is_ready: asyncio.Event,
        poll_s: float = POLL_S,
    ) -> None:
        self._devices = devices
        self._tasks = tasks
        # Told the id of an export when it and its clients are gone.
        self._on_deleted = on_deleted
        # Set when all that clients may ask for is there.
        self._is_ready = is_ready
        self._poll_s = poll_s
        self._offers: dict[str, Offer] = {}
        # Those that are offered no longer, but have clients still.
        self._leaving: set[str] = set()
        self.server: NbdServer | None = None
        self._is_end_told = False
        # Set unless the server is being stopped, which waits for requests of guests.
        self._has_stopped = asyncio.Event()
        self._has_stopped.set()

    def get(self, export_id: str) -> Offer | None:
        """The export with an id."""
        return self._offers.get(export_id)

    def __iter__(self) -> Iterator[Offer]:
        """All exports, newest first."""
        return reversed(list(self._offers.values()))

    # -- the server ---------------------------------------------------------------------------

    async def start_server(
        self,
        listen: Callable[[NbdServer], Awaitable[None]],
        max_connections: int = CONNECTION_COUNT_MAX,
    ) -> None:
        """Start the NBD server where `listen` lets it listen.

        Raises:   RequestError: it runs already, or cannot listen there.
        Fails to: there is no server that is half started.
        """
        self._require_no_server()
        server = NbdServer(
            self._tasks,
            max_connections=max_connections or CONNECTION_COUNT_MAX,
            poll_s=self._poll_s,
            is_ready=self._is_ready,
        )
        async with AsyncExitStack() as undo:
            undo.push_async_callback(server.close)
            await listen(server)
            self._require_no_server()  # another client was faster
            undo.pop_all()
        self.server = server

    def _require_no_server(self) -> None:
        if not self._has_stopped.is_set():
            raise RequestError("NBD server is being stopped, and waits for requests of its guests")
        if self.server is not None:
            raise RequestError("NBD server already running")

    async def stop_server(self) -> None:
        """Disconnect all clients, remove all exports and stop listening.

        Raises:   RequestError: the server does not run.
        """
        async with self._devices.change():
            leaving = self._withdraw_all()
        await self._stop_server(leaving)

    def _withdraw_all(self) -> dict[str, list[asyncio.Task[None]]]:
        """Begin to stop the server: offer nothing any more. Tells what has to end, by export."""
        server = self._require_server()
        self._has_stopped.clear()
        staying = [export_id for export_id in self._offers if export_id not in self._leaving]
        self._leaving.update(staying)
        return {export_id: server.withdraw(export_id, force=True) for export_id in staying}

    @uninterrupted
    async def _stop_server(self, leaving: dict[str, list[asyncio.Task[None]]]) -> None:
        server = self.server
        assert server is not None, "it is stopped once"
        try:
            async with task_group() as group:
                for export_id, tasks in leaving.items():
                    group.create_task(self._forget_left(export_id, tasks))
        finally:
            self.server = None
            self._has_stopped.set()
            await server.close()

    async def end(self) -> None:
        """Disconnect all clients for good, and tell that the exports are gone: they go with the daemon.

        The disks stay, as what guests wrote is still to be brought to them.
        """
        if self.server is None:
            return
        await self.disconnect()
        if not self._is_end_told:
            self._is_end_told = True
            for export_id in self._offers:
                self._on_deleted(export_id)

    async def close(self) -> None:
        """Disconnect all clients, at once, and remove all exports and the server, if there is one."""
        if self.server is not None:
            await self.disconnect()
            if self._has_stopped.is_set():
                await self._stop_server(self._withdraw_all())
            await self._has_stopped.wait()

    async def disconnect(self) -> None:
        """Disconnect all clients for good; the exports stay as long as nobody removes them."""
        if self.server is not None:
            await self.server.close()

    def _require_server(self) -> NbdServer:
        if self.server is None or not self._has_stopped.is_set():
            raise RequestError("NBD server not running")
        return self.server

    # -- exports ------------------------------------------------------------------------------

    async def add(
        self,
        export_id: str,
        node: BlockNode,
        *,
        name: str,
        description: str = "",
        writable: bool = False,
        writethrough: bool = False,
        allocation_depth: bool = False,
    ) -> None:
        """Offer the disk of a node, for as long as `remove` is not called.

        `writethrough`: what is written is on the disk before it is acknowledged.
        `allocation_depth`: clients may ask in which layer of its chain data is.

        Raises:   RequestError: id or name are in use or no good, or the node cannot be written.
        """
        if not is_well_formed(export_id):
            raise RequestError("Invalid block export id")
        async with self._devices.change():
            if export_id in self._offers:
                raise RequestError(f"Block export id '{export_id}' is already in use")
            self._devices.require_present(node)
            if writable and node.read_only:
                raise RequestError("Cannot export read-only node as writable", kind=ErrorKind.READ_ONLY)
            server = self._require_server()
            claim = await self._permitted(node, writable=writable)
            device = self._devices.on(node)
            try:
                allows_many = server.max_connections > 1
                export = Export(
                    *(name, device.root, writable, description, export_id, allows_many),
                    writethrough=writethrough,
                    allocation_depth=allocation_depth,
                )
                server.add_export(export)
                self._devices.graph.permissions.claim(claim)
                device.exports[export_id] = claim
                self._devices.graph.nodes.touch(node)
                self._offers[export_id] = Offer(export, device)
            finally:
                await self._devices.forget_unused(device)

    async def _permitted(self, node: BlockNode, *, writable: bool) -> Claim:
        """What an export claims: clients are not told of another size, so there must be none."""
        need = CONSISTENT_READ | (WRITE if writable else Permission.NONE)
        claim = Claim(node, need, EVERYTHING & ~RESIZE)
        try:
            planned = self._devices.graph.permissions.require(claim)
        except RequestError:
            # As with QEMU, who keeps it from what it needs is told before whom it keeps from resizing.
            self._devices.graph.permissions.require(Claim(node, need))
            raise
        await self._devices.graph.nodes.locks.take(planned)
        return claim

    async def remove(self, export_id: str, *, force: bool) -> None:
        """Withdraw an export; with `force` its clients are disconnected, otherwise it must have none.

        Raises:   RequestError: there is no such export, or it has clients.
        """
        async with self._devices.change():
            if export_id not in self._offers:
                raise RequestError(f"Export '{export_id}' is not found")
            leaving = self._require_server().withdraw(export_id, force=force)
            self._leaving.add(export_id)
            if not leaving:
                await self._forget(export_id)
        if leaving:
            await self._forget_left(export_id, leaving)

    @uninterrupted
    async def _forget_left(self, export_id: str, leaving: list[asyncio.Task[None]]) -> None:
        """Forget an export when its clients have left, also when nobody waits for that any more."""
        if leaving:  # requests that hang keep nothing else from being changed
            await asyncio.wait(leaving)
        async with self._devices.change_unasked():
            await self._forget(export_id)

    @uninterrupted
    async def _forget(self, export_id: str) -> None:
        """Let go of the disk of an export that has no clients any more.

        Locks:    the caller holds `Devices.changing`.
        """
        self._leaving.discard(export_id)
        device = self._offers.pop(export_id).device
        self._devices.graph.permissions.release(device.exports.pop(export_id))
        self._devices.graph.nodes.touch(device.node)
        await self._devices.forget_unused(device)
        await self._devices.adjust_locks()
        self._on_deleted(export_id)
