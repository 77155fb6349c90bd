"""Exports: disks offered over NBD, and the server that offers them."""

import asyncio
from collections.abc import Callable, Iterator
from typing import NamedTuple

from blockd.block.chain import unfiltered
from blockd.block.node import BlockNode
from blockd.devices.device import Device, Devices
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
        poll_s: float = POLL_S,
    ) -> None:
        self._devices = devices
        self._tasks = tasks
        # Told the id of an export when it and its clients are gone.
        self._on_deleted = on_deleted
        self._poll_s = poll_s
        self._offers: dict[str, Offer] = {}
        self.server: NbdServer | None = None
        # One change at a time; taken before `Devices.changing`.
        self._changing = asyncio.Lock()

    def __iter__(self) -> Iterator[Offer]:
        """All exports, newest first."""
        return reversed(list(self._offers.values()))

    # -- the server ---------------------------------------------------------------------------

    def start_server(self, max_connections: int = CONNECTION_COUNT_MAX) -> NbdServer:
        """Start the NBD server; the caller lets it listen.

        Raises:   RequestError: it runs already.
        """
        if self.server is not None:
            raise RequestError("NBD server already running")
        self.server = NbdServer(
            self._tasks, max_connections=max_connections or CONNECTION_COUNT_MAX, poll_s=self._poll_s
        )
        return self.server

    async def stop_server(self) -> None:
        """Disconnect all clients, remove all exports and stop listening.

        Raises:   RequestError: the server does not run.
        """
        async with self._changing:
            server = self._require_server()
            for export_id in list(self._offers):
                await self._remove(server, export_id, force=True)
            self.server = None
            await server.close()

    def _require_server(self) -> NbdServer:
        if self.server is None:
            raise RequestError("NBD server not running")
        return self.server

    # -- exports ------------------------------------------------------------------------------

    async def add(
        self, export_id: str, node: BlockNode, *, name: str, description: str = "", writable: bool = False
    ) -> None:
        """Offer the disk of a node, for as long as `remove` is not called.

        Raises:   RequestError: id or name are in use or no good, or the node cannot be written.
        """
        if not is_well_formed(export_id):
            raise RequestError("Invalid block export id")
        async with self._changing, self._devices.changing:
            if export_id in self._offers:
                raise RequestError(f"Block export id '{export_id}' is already in use")
            self._devices.require_present(node)
            if writable:
                self._require_writable(node)
            server = self._require_server()
            device = self._devices.on(node)
            try:
                export = Export(name, device.root, writable, description, export_id)
                server.add_export(export)
                device.exports.add(export_id)
                if writable:
                    device.writable_exports.add(export_id)
                self._offers[export_id] = Offer(export, device)
            finally:
                await self._devices.forget_unused(device)

    def _require_writable(self, node: BlockNode) -> None:
        if node.read_only:
            raise RequestError("Cannot export read-only node as writable", kind=ErrorKind.READ_ONLY)
        for parent, role in self._devices.graph.parents(unfiltered(node)):
            if role == "backing":
                raise RequestError(
                    f"Conflicts with use by {parent.node_name} as 'backing', which does not allow 'write' on "
                    f"{node.node_name}"
                )

    async def remove(self, export_id: str, *, force: bool) -> None:
        """Withdraw an export; with `force` its clients are disconnected, otherwise it must have none.

        Raises:   RequestError: there is no such export, or it has clients.
        """
        async with self._changing:
            if export_id not in self._offers:
                raise RequestError(f"Export '{export_id}' is not found")
            await self._remove(self._require_server(), export_id, force=force)

    async def _remove(self, server: NbdServer, export_id: str, *, force: bool) -> None:
        await server.remove_export(export_id, force)
        device = self._offers.pop(export_id).device
        device.exports.discard(export_id)
        device.writable_exports.discard(export_id)
        async with self._devices.changing:
            await self._devices.forget_unused(device)
        self._on_deleted(export_id)
