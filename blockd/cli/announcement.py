"""What is said when the daemon is ready: where it listens, in lines to copy."""

from urllib.parse import quote

from blockd.config import (
    Address,
    Config,
    FileDevice,
    HttpServer,
    InetAddress,
    MovedDevice,
    QmpSocket,
    Served,
    StdioChardev,
    StoppedJob,
    UnixAddress,
)
from blockd.filenames import absolute
from blockd.units import format_size

_NEGOTIATE = """'{"execute":"qmp_capabilities"}{"execute":"query-block"}'"""


def ready_lines(config: Config, served: Served) -> list[str]:
    """Say how to connect to a daemon that was started with blockd's own options for people.

    Who uses qemu-storage-daemon's options alone knows where the sockets are, and may read QMP from
    standard output. Without options the journal tells all.
    """
    options = [given.option for given in config.options]
    sockets = [option.path for option in options if isinstance(option, QmpSocket)] or [*served.qmp]
    asked = [option.name for option in options if isinstance(option, FileDevice)] or [*served.devices]
    is_for_people = bool(sockets) or any(isinstance(option, FileDevice) for option in options)
    if any(isinstance(option, StdioChardev) for option in options) or (options and not is_for_people):
        return []
    devices = [name for name in asked if name in served.devices]
    lines = ["blockd is ready; Ctrl-C or `quit` ends it."]
    for path in sockets:
        where = absolute(path)
        lines.append(f"  QMP  {path}\n       (echo {_NEGOTIATE}; cat) | socat - UNIX-CONNECT:{where}")
    for address in served.nbd:
        lines += [f"  NBD  {_nbd_uri(address, name)}" for name in served.exports]
        if not served.exports:
            lines.append(f"  NBD  {_nbd_uri(address, '')}, which has no exports yet")
    lines += [f"  HTTP {_http_url(server)}" for server in options if isinstance(server, HttpServer)]
    if sockets and devices:
        socket = "" if sockets[0] == "blockd.qmp" else f" --socket {sockets[0]}"
        lines.append(f"  next: blockctl{socket} list; blockctl{socket} stream {devices[0]} --wait")
    return lines


def stopped_line(job: StoppedJob) -> str:
    """Say where a job stands that the end of the daemon has stopped, and how it goes on."""
    at = f"{job.type} '{job.id}' stopped at {format_size(job.offset)} of {format_size(job.length)}"
    if job.is_kept:
        return f"{at}; it goes on at the next start with --state-dir"
    if job.type != "stream":
        return f"{at}: it was cancelled"
    return f"{at}; what was copied stays: stream again after the next start to copy the rest"


def moved_line(device: MovedDevice) -> str:
    """Say which image the next start has to name: that of this start is an old one by now."""
    return (
        f"{device.name} is on {device.filename} now: start with that file next time; the image it began on "
        "lacks what the guest has written since"
    )


def _http_url(server: HttpServer) -> str:
    address = server.addr
    if isinstance(address, UnixAddress):
        return f"curl --unix-socket {absolute(address.path)} http://localhost/api/status"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"http://{host}:{address.port}/"


def _nbd_uri(address: Address, export: str) -> str:
    if isinstance(address, UnixAddress):
        return f"nbd+unix:///{quote(export)}?socket={quote(absolute(address.path))}"
    if isinstance(address, InetAddress):
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"nbd://{host}:{address.port}/{quote(export)}"
    return f"on file descriptor {address.fd}, export {export}"
