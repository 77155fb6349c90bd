"""What the daemon is told to do: the command line as values, in the order given.

The order counts, as with qemu-storage-daemon: a node must stand before the export that names it. Each
option keeps the text it was read from, so that an error met while doing it can say which one it was:
`RequestError(f"{given.where}: {error.message}")`; `cli/` puts the program's name in front.
"""

from typing import NamedTuple, TypeAlias


class UnixAddress(NamedTuple):
    """A socket in the file system."""

    path: str


class InetAddress(NamedTuple):
    """A TCP port."""

    host: str
    port: int


class FdAddress(NamedTuple):
    """A socket that was open when the daemon was started."""

    fd: int


Address: TypeAlias = UnixAddress | InetAddress | FdAddress


# Members of a node's options that name the node below it, or are the options of one.
BELOW = ("file", "image", "backing")


class Blockdev(NamedTuple):
    """Add a node to the graph; `options` are BlockdevOptions as blockdev-add takes them."""

    options: dict[str, object]


class Object(NamedTuple):
    """Define an object; `options` are checked, as object-add takes them."""

    options: dict[str, object]


class SocketChardev(NamedTuple):
    """Where a monitor listens (`server`) or connects to (not `server`)."""

    id: str
    address: Address
    server: bool = False


class StdioChardev(NamedTuple):
    """The daemon's own standard input and output."""

    id: str


class Monitor(NamedTuple):
    """Serve QMP on a chardev defined before."""

    chardev: str
    pretty: bool = False


class NbdServer(NamedTuple):
    """Start the NBD server."""

    addr: Address
    max_connections: int = 100


class Export(NamedTuple):
    """Offer a node, or the device on it, over NBD."""

    id: str
    node_name: str
    name: str | None = None
    description: str = ""
    writable: bool = False
    writethrough: bool = False
    allocation_depth: bool = False


class FileDevice(NamedTuple):
    """A device on an image file with its whole backing chain, exported writable under its name.

    The export follows when all options are done, for the NBD server may come after the device.
    """

    name: str
    filename: str
    format: str | None = None
    # Of its backing file, if the image records one without its format.
    backing_format: str | None = None


class NodeDevice(NamedTuple):
    """A device on a node defined before; it is exported only by an Export of its own."""

    id: str
    node_name: str


class QmpSocket(NamedTuple):
    """Serve QMP on a unix socket: chardev and monitor in one."""

    path: str


class HttpServer(NamedTuple):
    """Show over HTTP what goes on: status, metrics."""

    addr: UnixAddress | InetAddress


Option: TypeAlias = (
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
    what an earlier run was, and without options that is all there is; what of it cannot be brought back is
    left out, or with `is_restore_strict` keeps the daemon from starting. Streams hold back when guests'
    requests take longer than `guest_latency_us`; 0: they never do. The NBD server polls for `nbd_poll_us` at
    most; 0: never. None leaves it to them.
    """

    options: tuple[Given, ...]
    pidfile: str | None = None
    image_paths: tuple[str, ...] = ()
    state_dir: str | None = None
    is_restore_strict: bool = False
    guest_latency_us: int | None = None
    nbd_poll_us: int | None = None


class Served(NamedTuple):
    """What a daemon that is ready serves, which the journal may have changed from what the options say."""

    devices: tuple[str, ...]
    nbd: tuple[Address, ...]
    """Where the NBD server listens, but for sockets that were inherited."""
    exports: tuple[str, ...]
    """Their names."""
    qmp: tuple[str, ...] = ()
    """The unix sockets for QMP that the journal told of."""


class StoppedJob(NamedTuple):
    """A job that had not done its work when the daemon ended; `offset` of `length` is how far it was."""

    type: str
    id: str
    offset: int
    length: int
    is_kept: bool
    """The next start goes on with it; otherwise it was cancelled."""


class MovedDevice(NamedTuple):
    """A device that has another active image than at the start, which the next start does not know of."""

    name: str
    filename: str
