"""The NBD server and its exports."""

from typing import Annotated, Literal, NoReturn

from pydantic import Field

from blockd.commands.context import Services
from blockd.commands.left_out import give_up
from blockd.commands.topic import Table
from blockd.devices.left_out import Kind
from blockd.errors import RequestError
from blockd.exports.nbd.server import CONNECTION_COUNT_MAX, NbdServer
from blockd.qmp.models import Arguments, Members, Result, UInt32

TABLE: Table = Table()

RemoveMode = Literal["safe", "hard"]


# -- the server --------------------------------------------------------------------------------


class UnixAddress(Members):
    """A socket in the file system."""

    path: str


class InetAddress(Members):
    """A TCP port."""

    host: str
    port: str


class FdAddress(Members):
    """A socket that was open when the daemon was started."""

    str: str


class UnixListener(Members):
    """Where to listen."""

    type: Literal["unix"]
    data: UnixAddress

    async def open(self, server: NbdServer) -> None:
        await server.listen_unix(self.data.path)


class InetListener(Members):
    """Where to listen."""

    type: Literal["inet"]
    data: InetAddress

    async def open(self, server: NbdServer) -> None:
        await server.listen_tcp(self.data.host, _number(self.data.port, "port"))


class FdListener(Members):
    """Where to listen."""

    type: Literal["fd"]
    data: FdAddress

    async def open(self, server: NbdServer) -> None:
        server.listen_fd(_number(self.data.str, "str"))


# No number of a port or a descriptor is this long.
NUMBER_LENGTH_END = 20


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < NUMBER_LENGTH_END):
        raise RequestError(f"Parameter 'addr.data.{name}' is not a number: '{text}'")
    return int(text)


class NbdServerStartArguments(Arguments):
    """Where the server listens, and how many clients it takes at once."""

    addr: Annotated[UnixListener | InetListener | FdListener, Field(discriminator="type")]
    tls_creds: str | None = None
    max_connections: UInt32 = CONNECTION_COUNT_MAX


@TABLE.command("nbd-server-start")
async def nbd_server_start(services: Services, arguments: NbdServerStartArguments) -> None:
    """Start the NBD server."""
    if arguments.tls_creds is not None:
        _refuse_tls(services, arguments.tls_creds)
    await services.exports.start_server(arguments.addr.open, arguments.max_connections)


def _refuse_tls(services: Services, object_id: str) -> NoReturn:
    """Nobody who asks for TLS gets a server without it."""
    found = services.objects.get(object_id)
    if found is None:
        raise RequestError(f"No TLS credentials with id '{object_id}'")
    if found.type != "tls-creds-x509":
        raise RequestError(f"Object with id '{object_id}' is not TLS credentials")
    raise RequestError("The NBD server cannot do TLS yet; start it without 'tls-creds' on a unix socket")


@TABLE.command("nbd-server-stop")
async def nbd_server_stop(services: Services) -> None:
    """Disconnect all clients, remove all exports and stop the NBD server."""
    await services.exports.stop_server()


# -- exports -----------------------------------------------------------------------------------


class BlockExportAddArguments(Arguments):
    """What to export, and how."""

    type: Literal["nbd"]
    id: str
    node_name: str
    name: str | None = None
    """What clients call it; the node's name without it."""
    description: str = ""
    writable: bool = False
    writethrough: bool = False
    """Whether what is written is on the disk before it is acknowledged."""
    allocation_depth: bool = False
    """Whether clients may ask in which layer of the chain data is, with NBD's `qemu:allocation-depth`."""
    iothread: str | None = None
    """An object of this type, without effect: there are no threads to choose from."""
    fixed_iothread: bool = False
    """Accepted, without effect."""


@TABLE.command("block-export-add")
async def block_export_add(services: Services, arguments: BlockExportAddArguments) -> None:
    """Offer a node to NBD clients."""
    if arguments.iothread is not None:
        _require_iothread(services, arguments.iothread)
    if arguments.node_name not in services.graph.nodes:
        raise RequestError(f"Cannot find device='' nor node-name='{arguments.node_name}'")
    await services.exports.add(
        arguments.id,
        services.graph[arguments.node_name],
        name=arguments.node_name if arguments.name is None else arguments.name,
        description=arguments.description,
        writable=arguments.writable,
        writethrough=arguments.writethrough,
        allocation_depth=arguments.allocation_depth,
    )


def _require_iothread(services: Services, object_id: str) -> None:
    found = services.objects.get(object_id)
    if found is None or found.type != "iothread":
        raise RequestError(f'iothread "{object_id}" not found')


class BlockExportDelArguments(Arguments):
    """Which export, and whether also when it has clients."""

    id: str
    mode: RemoveMode = "safe"
    """``hard`` disconnects the clients; with ``safe`` there must be none."""


@TABLE.command("block-export-del")
async def block_export_del(services: Services, arguments: BlockExportDelArguments) -> None:
    """Withdraw an export."""
    if give_up(services, Kind.EXPORT, arguments.id):
        return
    await services.exports.remove(arguments.id, force=arguments.mode == "hard")


class BlockExportInfo(Result):
    """An export."""

    id: str
    type: Literal["nbd"] = "nbd"
    node_name: str
    shutting_down: bool = False


@TABLE.command("query-block-exports")
async def query_block_exports(services: Services) -> list[BlockExportInfo]:
    """List the exports, the newest first."""
    return [
        BlockExportInfo(id=offer.export.export_id, node_name=offer.device.node.node_name)
        for offer in services.exports
    ]


class NbdServerAddArguments(Arguments):
    """What to export, and how."""

    device: str
    """A device or node."""
    name: str | None = None
    """What clients call it, and its id; the name of the device or node without it."""
    description: str = ""
    writable: bool = False


@TABLE.command("nbd-server-add", features=("deprecated",))
async def nbd_server_add(services: Services, arguments: NbdServerAddArguments) -> None:
    """Offer a device or node to NBD clients; one that cannot be written is offered read-only."""
    node = services.devices.find_node(arguments.device)
    name = arguments.device if arguments.name is None else arguments.name
    writable = arguments.writable and not node.read_only
    await services.exports.add(name, node, name=name, description=arguments.description, writable=writable)


class NbdServerRemoveArguments(Arguments):
    """Which export, and whether also when it has clients."""

    name: str
    mode: RemoveMode = "safe"
    """``hard`` disconnects the clients; with ``safe`` there must be none."""


@TABLE.command("nbd-server-remove", features=("deprecated",))
async def nbd_server_remove(services: Services, arguments: NbdServerRemoveArguments) -> None:
    """Withdraw an export."""
    await services.exports.remove(arguments.name, force=arguments.mode == "hard")
