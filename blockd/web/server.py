"""The HTTP server: what paths there are, who may ask, and how long an answer may take.

    /              a page for people, which asks for /api/status every second
    /api/status    the status as JSON
    /metrics       the same for Prometheus
    /healthz       "ok"

Nothing can be changed here, so a foreign page that makes a browser ask gains nothing; that it cannot read the
answers, whatever name it gave our address, is what the check of Host is for. A connection is for one request
and has two deadlines: one for the head of the request, one for the answer.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from importlib import resources
from ipaddress import ip_address
from types import TracebackType
from typing import NamedTuple, Self, cast

from aiohttp import web

from blockd.aio import addresses_of, keeping_socket_files, let_go
from blockd.errors import RequestError
from blockd.qmp.unix_socket import SocketFile
from blockd.web.metrics import CONTENT_TYPE, metrics_of
from blockd.web.status import Status, json_of

log = logging.getLogger(__name__)
# aiohttp logs, with a traceback and what was sent, each request that is none.
_SILENT = logging.Logger("silent", logging.CRITICAL + 1)

# A browser opens six, Prometheus one.
CONNECTION_COUNT_MAX = 64
# All that a connection may send: the head of one request. A line of it at most an eighth of that.
REQUEST_LENGTH_MAX = 64 * 1024
LINE_LENGTH_MAX = 8 * 1024
DEADLINE_S = 10.0
_BACKLOG = 64

# What a browser may have in its address bar when it asks us.
_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "blockd",
}
_FILES = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript")} | {
    "/page.css": ("page.css", "text/css")
}


class _Answer(NamedTuple):
    """What a path has to say."""

    body: bytes
    content_type: str


class WebServer:
    """Serves the status that `look` returns; nothing listens before it is told where.

    ``async with`` ends it: nobody is waited for.
    """

    def __init__(self, look: Callable[[], Awaitable[Status]], *, deadline_s: float = DEADLINE_S) -> None:
        self._look = look
        self._deadline_s = deadline_s
        self._hosts = {*_HOSTS}
        self._connections: dict[asyncio.BaseProtocol, _Connection] = {}
        self._listeners: list[asyncio.Server] = []
        self._undoing = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._http = web.Server(
            self._answer,
            access_log=None,
            logger=_SILENT,
            tcp_keepalive=False,
            lingering_time=0,
            max_line_size=LINE_LENGTH_MAX,
            max_field_size=LINE_LENGTH_MAX,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for listener in self._listeners:
            listener.close()
        await self._undoing.aclose()
        for connection in list(self._connections.values()):
            connection.cut()
        await self._http.shutdown(timeout=0)

    # -- listening ----------------------------------------------------------------------------

    async def listen_unix(self, path: str) -> None:
        """Serve those who may use our files.

        Raises:   RequestError: the name is taken or no good.
        """
        file = await SocketFile.create(path)
        self._undoing.push_async_callback(file.remove)
        loop = asyncio.get_running_loop()
        start = keeping_socket_files(loop.create_unix_server)
        self._listeners.append(await start(self._accept, sock=file.listener))

    async def listen_tcp(self, host: str, port: int) -> None:
        """Serve everybody on this machine, on all loopback addresses that `host` stands for.

        Raises:   RequestError: an address is not a loopback address, unknown or in use.
        """
        try:
            found = await addresses_of(host, port)
        except OSError as error:
            raise RequestError(f"Could not listen on '{host}': {error.strerror}") from error
        for _, address in found:
            if not ip_address(address).is_loopback:
                raise RequestError(
                    f"Could not listen on '{host}': HTTP is for this machine only, on a loopback address "
                    "such as 127.0.0.1 or on a unix socket"
                )
        addresses = sorted({address for _, address in found})
        loop = asyncio.get_running_loop()
        try:
            self._listeners.append(await loop.create_server(self._accept, addresses, port, backlog=_BACKLOG))
        except OSError as error:
            raise RequestError(f"Could not listen on '{host}' port {port}: {error.strerror}") from error
        self._hosts.add(f"[{host}]" if ":" in host else host.lower())

    @property
    def ports(self) -> list[int]:
        """The TCP ports that are served."""
        sockets = [sock for listener in self._listeners for sock in listener.sockets]
        return [sock.getsockname()[1] for sock in sockets if sock.family != socket.AF_UNIX]

    # -- serving ------------------------------------------------------------------------------

    def _accept(self) -> "_Connection":
        handler = self._http()
        connection = _Connection(handler, self._deadline_s, lambda: self._connections.pop(handler, None))
        if len(self._connections) >= CONNECTION_COUNT_MAX:
            connection.is_refused = True
        else:
            self._connections[handler] = connection
        return connection

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        connection = self._connections.get(request.protocol)
        if connection is not None:
            connection.expect()
        try:
            response = await self._respond(request)
        except Exception:
            log.exception("HTTP %s: internal error", request.path)
            response = web.Response(status=500, text="internal error, see the log of blockd\n")
        response.headers.update(_HEADERS)
        response.force_close()
        return response

    async def _respond(self, request: web.BaseRequest) -> web.Response:
        if not self._is_known(request.headers.getall("Host", [])):
            known = ", ".join(sorted(self._hosts))
            return web.Response(status=403, text=f"unknown Host: ask for one of {known}\n")
        if request.method not in ("GET", "HEAD"):
            return web.Response(
                status=405, text="read-only interface: use QMP\n", headers={"Allow": "GET, HEAD"}
            )
        if request.body_exists:
            return web.Response(status=413, text="nothing is taken here\n")
        answer = await self._find(request.path)
        if answer is None:
            return web.Response(status=404, text="/, /api/status, /metrics and /healthz are here\n")
        return web.Response(body=answer.body, headers={"Content-Type": answer.content_type})

    def _is_known(self, names: list[str]) -> bool:
        if len(names) != 1:
            return False
        name, colon, port = names[0].lower().rpartition(":")
        return (name if colon and port.isdigit() else names[0].lower()) in self._hosts

    async def _find(self, path: str) -> _Answer | None:
        match path:
            case "/healthz":
                return _Answer(b"ok\n", "text/plain; charset=utf-8")
            case "/api/status":
                return _Answer(await self._shown_by(json_of), "application/json")
            case "/metrics":
                return _Answer(await self._shown_by(metrics_of), CONTENT_TYPE)
        if path not in _FILES:
            return None
        name, content_type = _FILES[path]
        body = resources.files("blockd.web").joinpath("static", name).read_bytes()
        return _Answer(body, f"{content_type}; charset=utf-8")

    async def _shown_by(self, write: Callable[[Status], Awaitable[bytes]]) -> bytes:
        status = await self._look()
        text = await write(status)
        await let_go(status.devices)
        return text


class _Connection(asyncio.Protocol):
    """What stands between the socket and aiohttp's protocol, and cuts what takes too long or too much."""

    is_refused = False

    def __init__(self, inner: asyncio.Protocol, deadline_s: float, forget: Callable[[], object]) -> None:
        self._inner = inner
        self._deadline_s = deadline_s
        self._forget = forget
        self._received = 0
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def expect(self) -> None:
        """From now on there is one more time span for what comes next."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._deadline_s, self.cut)

    def cut(self) -> None:
        """End it now."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        self._inner.connection_made(transport)
        if self.is_refused:
            self.cut()
        else:
            self.expect()

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._received > REQUEST_LENGTH_MAX:
            self.cut()
        else:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._forget()
        self._inner.connection_lost(error)
