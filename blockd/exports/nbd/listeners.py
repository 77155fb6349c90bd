"""Sockets that wait for clients: on a path, on a loopback address, or handed in by whoever started us."""

import socket

from blockd.aio import addresses_of
from blockd.errors import RequestError
from blockd.filenames import absolute
from blockd.qmp.unix_socket import BACKLOG, SocketFile

PORT_MAX = 65535

# Where to listen: an absolute path, or an address and a port.
Place = str | tuple[str, int]


class Listener:
    """A listening socket; one on a path also takes care of its socket file."""

    def __init__(
        self, sock: socket.socket, address: str, place: Place | None, file: SocketFile | None = None
    ) -> None:
        self.sock = sock
        self.address = address
        # None: it was inherited, and cannot be made again.
        self.place = place
        sock.setblocking(False)
        self._file = file

    async def close(self) -> None:
        """Stop listening; the socket file goes too, if it is still ours."""
        self.sock.close()
        if self._file is not None:
            await self._file.remove()


async def listen_unix(path: str) -> Listener:
    """Listen on a unix socket that only our own user can connect to.

    Raises:   RequestError: somebody listens there already, something else than a socket is there,
              or the file cannot be made.
    """
    file = await SocketFile.create(path)
    return Listener(file.listener, f"nbd+unix:///?socket={path}", absolute(path), file)


async def listen_tcp(host: str, port: int) -> list[Listener]:
    """Listen on every loopback address that `host` stands for.

    Raises:   RequestError: an address is not a loopback address, unknown or in use.
    """
    if port > PORT_MAX:
        raise RequestError(f"Could not listen on '{host}' port {port}: the last port is {PORT_MAX}")
    try:
        found = await addresses_of(host, port)
    except OSError as error:
        raise RequestError(f"Could not listen on '{host}': {error.strerror}") from error
    listeners: list[Listener] = []
    try:
        for family, address in found:
            sock, port = _listen_tcp_address(family, address, port)
            shown = f"[{address}]" if family == socket.AF_INET6 else address
            listeners.append(Listener(sock, f"nbd://{shown}:{port}", (address, port)))
    except RequestError:
        for listener in listeners:
            await listener.close()
        raise
    return listeners


def _listen_tcp_address(family: int, host: str, port: int) -> tuple[socket.socket, int]:
    """Make a socket, and tell its port, which may have been 0."""
    from ipaddress import ip_address  # noqa: PLC0415  # not needed for a start on a unix socket

    if not ip_address(host).is_loopback:
        raise RequestError(
            f"Could not listen on '{host}': without TLS only loopback addresses such as 127.0.0.1 are served"
        )
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        return sock, sock.getsockname()[1]
    except OSError as error:
        sock.close()
        raise RequestError(f"Could not listen on '{host}' port {port}: {error.strerror}") from error


def listen_fd(fd: int) -> Listener:
    """Take over a listening socket that was inherited.

    Raises:   RequestError: the descriptor is not open or no listening socket.
    """
    try:
        sock = socket.socket(fileno=fd)
        is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise RequestError(f"Could not listen on file descriptor {fd}: {error.strerror}") from error
    if not is_listening:
        sock.detach()
        raise RequestError(f"Could not listen on file descriptor {fd}: it is not a listening socket")
    return Listener(sock, f"fd:{fd}", None)
