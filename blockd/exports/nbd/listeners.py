"""Sockets that wait for clients: on a path, on a loopback address, or handed in by whoever started us."""

import asyncio
import errno
import os
import socket
import stat
from pathlib import Path

from blockd.errors import RequestError

PORT_MAX = 65535
# Clients that may wait to be accepted; beyond it the kernel refuses them.
BACKLOG = 128


class Listener:
    """A listening socket; one on a path also takes care of its socket file."""

    def __init__(
        self, sock: socket.socket, address: str, path: Path | None = None, *, is_inherited: bool = False
    ) -> None:
        self.sock = sock
        self.address = address
        self.is_inherited = is_inherited
        sock.setblocking(False)
        self._path = path
        self._identity = _identity(path) if path is not None else None

    def close(self) -> None:
        """Stop listening; the socket file goes too, if it is still ours."""
        self.sock.close()
        if self._path is not None and _identity(self._path) == self._identity:
            self._path.unlink()


def listen_unix(path: str) -> Listener:
    """Listen on a unix socket that only our own user can connect to.

    Raises:   RequestError: somebody listens there already, something else than a socket is there,
              or the file cannot be made.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        _remove_stale(path)
        sock.bind(path)
        Path(path).chmod(0o600)  # before listen(): until then nobody can connect
        sock.listen(BACKLOG)
    except (OSError, ValueError) as error:
        sock.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RequestError(f"Failed to bind socket to {path}: {reason}") from error
    except RequestError:
        sock.close()
        raise
    return Listener(sock, f"nbd+unix:///?socket={path}", Path(path))


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody answers on."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise RequestError(f"Failed to bind socket to {path}: the file exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise RequestError(f"Failed to bind socket to {path}: another process listens on it")
    Path(path).unlink()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


async def listen_tcp(host: str, port: int) -> list[Listener]:
    """Listen on every loopback address that `host` stands for.

    Raises:   RequestError: an address is not a loopback address, unknown or in use.
    """
    if port > PORT_MAX:
        raise RequestError(f"Could not listen on '{host}' port {port}: the last port is {PORT_MAX}")
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RequestError(f"Could not listen on '{host}': {error.strerror}") from error
    listeners: list[Listener] = []
    try:
        for family, _, _, _, address in found:
            port = listeners[0].sock.getsockname()[1] if listeners else port
            listeners.append(_listen_tcp_address(family, str(address[0]), port))
    except RequestError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listen_tcp_address(family: int, host: str, port: int) -> Listener:
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
    except OSError as error:
        sock.close()
        raise RequestError(f"Could not listen on '{host}' port {port}: {error.strerror}") from error
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    return Listener(sock, f"nbd://{shown}:{sock.getsockname()[1]}")


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
    return Listener(sock, f"fd:{fd}", is_inherited=True)
