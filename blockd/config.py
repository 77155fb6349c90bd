"""What the daemon is told to do: the command line as values, in the order given.

The order counts, as with qemu-storage-daemon: a node must stand before the export that names it. Each
option keeps the text it was read from, so that an error met while doing it can say which one it was:
`RequestError(f"{given.where}: {error.message}")`; `cli/` puts the program's name in front.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from blockd.qmp.models import Members

PORT_MAX = 65535


def _port(value: object) -> object:
    """QEMU writes port numbers as strings."""
    if isinstance(value, str) and not (value.isascii() and value.isdigit() and int(value) <= PORT_MAX):
        raise ValueError(f"'{value}' is not a port number (0 to {PORT_MAX})")
    return int(value) if isinstance(value, str) else value


def _descriptor(value: object) -> object:
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        raise ValueError(f"Unable to parse FD number {value}")
    return int(value) if isinstance(value, str) else value


class UnixAddress(Members):
    """A socket in the file system."""

    type: Literal["unix"] = "unix"
    path: str


class InetAddress(Members):
    """A TCP port."""

    type: Literal["inet"] = "inet"
    host: str
    port: Annotated[int, BeforeValidator(_port)]


class FdAddress(Members):
    """A socket that was open when the daemon was started."""

    type: Literal["fd"] = "fd"
    fd: Annotated[int, BeforeValidator(_descriptor)] = Field(alias="str")


Address = UnixAddress | InetAddress | FdAddress
TaggedAddress = Annotated[Address, Field(discriminator="type")]


class Blockdev(Members):
    """Add a node to the graph; `options` are BlockdevOptions as blockdev-add takes them."""

    options: dict[str, object]


class Object(Members):
    """Define an object; `options` are checked, as object-add takes them."""

    options: dict[str, object]


class SocketChardev(Members):
    """Where a monitor listens (`server`) or connects to (not `server`)."""

    id: str
    address: TaggedAddress
    server: bool = False


class StdioChardev(Members):
    """The daemon's own standard input and output."""

    id: str


class Monitor(Members):
    """Serve QMP on a chardev defined before."""

    chardev: str
    mode: Literal["control"] = "control"
    pretty: bool = False


class NbdServer(Members):
    """Start the NBD server."""

    addr: TaggedAddress
    max_connections: Annotated[int, Field(ge=0, lt=1 << 32)] = 100


class Export(Members):
    """Offer a node, or the device on it, over NBD."""

    type: Literal["nbd"]
    id: str
    node_name: str
    name: str | None = None
    description: str | None = None
    writable: bool = False
    # Accepted for the sake of QEMU's command lines; there are no threads to choose from.
    iothread: str | None = None
    fixed_iothread: bool = False


class FileDevice(Members):
    """A device on an image file with its whole backing chain, exported writable under its name.

    The export follows when all options are done, for the NBD server may come after the device.
    """

    name: str
    filename: str
    format: str | None = None


class NodeDevice(Members):
    """A device on a node defined before; it is exported only by an Export of its own."""

    id: str
    node_name: str


class QmpSocket(Members):
    """Serve QMP on a unix socket: chardev and monitor in one."""

    path: str


class HttpServer(Members):
    """Show over HTTP what goes on: status, metrics."""

    addr: UnixAddress | InetAddress


Option = (
    Blockdev
    | Object
    | SocketChardev
    | StdioChardev
    | Monitor
    | NbdServer
    | Export
    | FileDevice
    | NodeDevice
    | QmpSocket
    | HttpServer
)


class Given(NamedTuple):
    """One option, and the text of the command line it was read from.

    An option of a config file has the text that means the same, and `place` is its file and line.
    """

    argument: str
    option: Option
    place: str = ""

    @property
    def where(self) -> str:
        """What an error names."""
        return self.place or self.argument


class Config(NamedTuple):
    """All of it. The pidfile is written when everything else is ready.

    Names inside images may lead into `image_paths`, besides the folder of the image itself. `state_dir` has
    what an earlier run was, and without options that is all there is.
    """

    options: tuple[Given, ...]
    pidfile: str | None = None
    image_paths: tuple[str, ...] = ()
    state_dir: str | None = None
