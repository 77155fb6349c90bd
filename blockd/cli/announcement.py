"""What is said when the daemon is ready: where it listens, in lines to copy."""

from pathlib import Path
from urllib.parse import quote

from blockd.config import (
    Config,
    FileDevice,
    HttpServer,
    InetAddress,
    NbdServer,
    QmpSocket,
    StdioChardev,
    UnixAddress,
)

_NEGOTIATE = """'{"execute":"qmp_capabilities"}{"execute":"query-block"}'"""


def ready_lines(config: Config) -> list[str]:
    """Say how to connect to a daemon that was started with blockd's own options for people.

    Who uses qemu-storage-daemon's options alone knows where the sockets are, and may read QMP from
    standard output.
    """
    options = [given.option for given in config.options]
    sockets = [option.path for option in options if isinstance(option, QmpSocket)]
    devices = [option.name for option in options if isinstance(option, FileDevice)]
    if any(isinstance(option, StdioChardev) for option in options) or not (sockets or devices):
        return []
    lines = ["blockd is ready; Ctrl-C or `quit` ends it."]
    for path in sockets:
        where = Path(path).absolute()
        lines.append(f"  QMP  {path}\n       (echo {_NEGOTIATE}; cat) | socat - UNIX-CONNECT:{where}")
    for server in options:
        if isinstance(server, NbdServer):
            lines += [f"  NBD  {_nbd_uri(server, name)}" for name in devices or ["EXPORT"]]
        elif isinstance(server, HttpServer):
            lines.append(f"  HTTP {_http_url(server)}")
    if sockets and devices:
        socket = "" if sockets[0] == "blockd.qmp" else f" --socket {sockets[0]}"
        lines.append(f"  next: blockctl{socket} list; blockctl{socket} stream {devices[0]} --wait")
    return lines


def _http_url(server: HttpServer) -> str:
    address = server.addr
    if isinstance(address, UnixAddress):
        return f"curl --unix-socket {Path(address.path).absolute()} http://localhost/api/status"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"http://{host}:{address.port}/"


def _nbd_uri(server: NbdServer, export: str) -> str:
    address = server.addr
    if isinstance(address, UnixAddress):
        return f"nbd+unix:///{quote(export)}?socket={quote(str(Path(address.path).absolute()))}"
    if isinstance(address, InetAddress):
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"nbd://{host}:{address.port}/{quote(export)}"
    return f"on file descriptor {address.fd}, export {export}"
