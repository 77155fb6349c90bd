"""What each option of the command line starts."""

import logging
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import NamedTuple

from blockd.block.node import BlockNode
from blockd.commands.context import Services
from blockd.config import (
    Blockdev,
    Export,
    FdAddress,
    FileDevice,
    Given,
    HttpServer,
    InetAddress,
    Monitor,
    NbdServer,
    NodeDevice,
    Object,
    Option,
    QmpSocket,
    SocketChardev,
    StdioChardev,
    UnixAddress,
)
from blockd.daemon.disagreement import difference, lacks, subject_of, thing_of
from blockd.devices.left_out import Kind, Thing
from blockd.drivers import FORMATS, unknown_format
from blockd.errors import RequestError
from blockd.exports.nbd.server import NbdServer as Server
from blockd.filenames import absolute
from blockd.qmp.server import QmpServer

log = logging.getLogger(__name__)


class ServedMonitor(NamedTuple):
    """Where QMP is served."""

    address: UnixAddress | InetAddress
    is_pretty: bool


class Starter:
    """Does the options one after the other: `start` for all of them, then `export`, then `accept`.

    What an option brings about is done once: `given` tells which have brought about what, and those of an
    earlier run are left as the journal has them.
    """

    def __init__(
        self, services: Services, qmp: QmpServer[Services], given: dict[str, str], stack: AsyncExitStack
    ) -> None:
        self.monitors: list[ServedMonitor] = []
        self._services = services
        self._qmp = qmp
        # Ends what is started here and has no other owner.
        self._stack = stack
        self._given = given
        self._earlier = dict(given)
        self._chardevs: dict[str, SocketChardev | StdioChardev] = {}

    async def start(self, given: Given) -> None:
        """Do what one option says.

        Raises:   BlockdError: it cannot be done; what it left is removed at the end of the daemon.
        """
        subject = subject_of(given.option)
        if subject in self._earlier:
            found = await difference(self._services, self._earlier[subject], given)
            if found is not None:
                log.warning("%s: %s", given.where, found)
            return
        if (missing := lacks(self._services.left_out, given.option)) is not None:
            self._leave_out(given, missing)
            return
        await self._start(given.option)
        if subject is not None:
            self._given[subject] = given.argument

    def _leave_out(self, given: Given, missing: Thing) -> None:
        """Go on without what needs a thing of an earlier run that is left out; the next start tries again."""
        reason = f"the {missing.kind} '{missing.name}' is not restored"
        log.error("%s: left out: %s: %s", given.where, reason, missing.reason)
        if (thing := thing_of(given.option)) is not None:
            node = missing.name if missing.kind is Kind.NODE else None
            self._services.left_out.add(Thing(*thing, reason, node, node))

    async def _start(self, option: Option) -> None:
        match option:
            case Blockdev():
                await self._services.graph.open(option.options)
            case Object():
                await self._services.objects.add(option.options)
            case SocketChardev() | StdioChardev():
                self._add_chardev(option)
            case Monitor():
                await self._add_monitor(option)
            case QmpSocket():
                await self._qmp.listen_unix(option.path)
                self._note_monitor(UnixAddress(path=option.path), is_pretty=False)
            case NbdServer():
                await self._services.exports.start_server(partial(_listen, option), option.max_connections)
            case Export():
                await self._add_export(option)
            case FileDevice():
                await self._add_file_device(option)
            case NodeDevice():
                self._services.devices.add(option.id, self._find(option.node_name))
            case HttpServer():
                pass  # `accept` serves it

    def _find(self, node_name: str) -> BlockNode:
        if node_name not in self._services.graph.nodes:
            raise RequestError(f"Cannot find device='' nor node-name='{node_name}'")
        return self._services.graph[node_name]

    def _add_chardev(self, option: SocketChardev | StdioChardev) -> None:
        if option.id in self._chardevs:
            raise RequestError(f"Duplicate ID '{option.id}' for chardev")
        self._chardevs[option.id] = option

    async def _add_monitor(self, option: Monitor) -> None:
        chardev = self._chardevs.get(option.chardev)
        if chardev is None:
            raise RequestError(f'chardev "{option.chardev}" not found')
        if isinstance(chardev, StdioChardev):
            await self._qmp.serve_stdio(pretty=option.pretty)
            return
        address = chardev.address
        match address, chardev.server:
            case UnixAddress(), True:
                await self._qmp.listen_unix(address.path, pretty=option.pretty)
            case UnixAddress(), False:
                await self._qmp.connect_unix(address.path, pretty=option.pretty)
            case InetAddress(), True:
                await self._qmp.listen_tcp(address.host, address.port, pretty=option.pretty)
            case InetAddress(), False:
                await self._qmp.connect_tcp(address.host, address.port, pretty=option.pretty)
            case FdAddress(), True:
                await self._qmp.listen_fd(address.fd, pretty=option.pretty)
            case FdAddress(), False:
                await self._qmp.serve_fd(address.fd, pretty=option.pretty)
        if chardev.server and not isinstance(address, FdAddress):
            self._note_monitor(address, is_pretty=option.pretty)

    def _note_monitor(self, address: UnixAddress | InetAddress, *, is_pretty: bool) -> None:
        if isinstance(address, UnixAddress):
            address = UnixAddress(path=absolute(address.path))
        self.monitors.append(ServedMonitor(address, is_pretty))

    async def _add_export(self, option: Export) -> None:
        await self._services.exports.add(
            option.id,
            self._find(option.node_name),
            name=option.node_name if option.name is None else option.name,
            description=option.description,
            writable=option.writable,
            writethrough=option.writethrough,
            allocation_depth=option.allocation_depth,
        )

    async def _add_file_device(self, option: FileDevice) -> None:
        for name in (option.format, option.backing_format):
            if name is not None and name not in FORMATS:
                raise RequestError(f"Could not open '{option.filename}': {unknown_format(name)}")
        node = await self._services.graph.open_image(
            option.filename, option.format, read_only=False, backing_format=option.backing_format
        )
        self._services.devices.add(option.name, node)

    async def _serve_http(self, option: HttpServer) -> None:
        # Loaded by those only who want it: aiohttp is larger than all of blockd.
        from blockd.web.server import WebServer  # noqa: PLC0415
        from blockd.web.status import Sources, status_of  # noqa: PLC0415

        services = self._services
        sources = Sources(
            services.devices, services.streams, services.jobs, services.exports, started=time.monotonic()
        )
        server = await self._stack.enter_async_context(WebServer(lambda: status_of(sources)))
        if isinstance(option.addr, UnixAddress):
            await server.listen_unix(option.addr.path)
        else:
            await server.listen_tcp(option.addr.host, option.addr.port)

    async def export(self, given: Given) -> None:
        """Offer a device of the command line under its name, if there is an NBD server."""
        option = given.option
        is_new = subject_of(option) not in self._earlier
        if isinstance(option, FileDevice) and is_new and self._services.exports.server is not None:
            node = self._services.devices.get(option.name).node
            await self._services.exports.add(option.name, node, name=option.name, writable=not node.read_only)

    async def accept(self, given: Given) -> None:
        """Serve what answers as soon as somebody connects: all is there.

        Sockets that were inherited are only taken now, and clients may have connected before we were started.
        """
        option, server = given.option, self._services.exports.server
        if isinstance(option, HttpServer):
            await self._serve_http(option)
        elif isinstance(option, NbdServer) and isinstance(option.addr, FdAddress) and server is not None:
            server.listen_fd(option.addr.fd)


async def _listen(option: NbdServer, server: Server) -> None:
    match option.addr:
        case UnixAddress(path=path):
            await server.listen_unix(path)
        case InetAddress(host=host, port=port):
            await server.listen_tcp(host, port)
