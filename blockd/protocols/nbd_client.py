"""A client for NBD servers: one connection, any number of requests in flight.

No task runs for it: the transport's callbacks complete the requests, each a future under its cookie.
"""

import asyncio
import errno
from types import TracebackType
from typing import Final, Self

from blockd.aio import connected
from blockd.errors import BlockdError, PeerError, RequestError, StorageError
from blockd.extents import Extent, Kind
from blockd.units import MIB
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd import haggling, transmission
from blockd.wire.nbd.haggling import ExportInfo, GoOption, MetaOption
from blockd.wire.nbd.transmission import Request

HAGGLING_LIMIT_S = 10.0
# A server that answers one option with more replies than this is not one.
_REPLY_COUNT_MAX = 1024
_UNSENT_HIGH = 4 * MIB

_ERRNO: Final = {
    nbd.EPERM: errno.EPERM,
    nbd.ENOMEM: errno.ENOMEM,
    nbd.EINVAL: errno.EINVAL,
    nbd.ENOSPC: errno.ENOSPC,
    nbd.EOVERFLOW: errno.EOVERFLOW,
    nbd.ENOTSUP: errno.ENOTSUP,
    nbd.ESHUTDOWN: errno.ESHUTDOWN,
}


class _Pending:
    """A request that was sent, and what has come of its reply."""

    def __init__(self, request: Request, done: asyncio.Future[None]) -> None:
        self.request = request
        self.done = done
        self.data = bytearray(request.length if request.command == nbd.CMD_READ else 0)
        self.covered = 0  # how many of its bytes the server has answered
        self.runs: list[transmission.StatusRun] = []
        self.error: BlockdError | None = None

    def place(self, offset: int, data: memoryview) -> None:
        """Put a part of a read's data where it belongs."""
        start = offset - self.request.offset
        if start < 0 or start + len(data) > len(self.data):
            raise PeerError("a reply carries data that was not asked for")
        self.data[start : start + len(data)] = data
        self.covered += len(data)

    def fail(self, error: int, text: str) -> None:
        code = _ERRNO.get(error, errno.EIO)
        what = f"command {self.request.command} at offset {self.request.offset}"
        self.error = StorageError(
            f"The NBD server failed {what}: {text or errno.errorcode[code]}", errno=code
        )

    def finish(self) -> None:
        if self.done.done():
            return  # the caller was cancelled meanwhile
        if self.error is not None:
            self.done.set_exception(self.error)
        else:
            self.done.set_result(None)


class NbdClient(asyncio.Protocol):
    """A connection to one export; made by `connect_unix` or `connect_tcp`, closed by ``async with``.

    Raises:   from every request: StorageError with the server's errno, or with ENOTCONN once the
              connection is lost; PeerError when the server broke the protocol.
    """

    def __init__(self) -> None:
        self.info = ExportInfo(0, 0)
        self.has_allocation = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._input = bytearray()
        self._has_news = asyncio.Event()  # haggling: more input came, or the connection was lost
        self._is_transmitting = False
        self._is_writable = asyncio.Event()
        self._is_writable.set()
        self._closed = asyncio.Event()
        self._failure: BlockdError | None = None
        self._pending: dict[int, _Pending] = {}
        self._cookie = 0

    @classmethod
    async def connect_unix(cls, path: str, export_name: str = "") -> Self:
        """Connect to the server on a unix socket and choose an export.

        Raises:   RequestError: nobody answers, or no such export. PeerError: not an NBD server.
        """
        try:
            _, client = await asyncio.get_running_loop().create_unix_connection(cls, path)
        except OSError as error:
            raise RequestError(f"Could not connect to '{path}': {error.strerror}") from error
        return await client._choose(export_name)

    @classmethod
    async def connect_tcp(cls, host: str, port: int, export_name: str = "") -> Self:
        """Connect to a server over TCP and choose an export; raises as `connect_unix`."""
        try:
            connection = await connected(host, port)
            _, client = await asyncio.get_running_loop().create_connection(cls, sock=connection)
        except OSError as error:
            raise RequestError(f"Could not connect to '{host}' port {port}: {error.strerror}") from error
        return await client._choose(export_name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.disconnect()

    @property
    def size(self) -> int:
        return self.info.size

    @property
    def is_read_only(self) -> bool:
        return bool(self.info.flags & nbd.TRANSMISSION_READ_ONLY)

    # -- requests -----------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytearray:
        return (await self._request(0, nbd.CMD_READ, offset, length)).data

    async def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        await self._request(_fua(fua), nbd.CMD_WRITE, offset, len(data), data)

    async def flush(self) -> None:
        await self._request(0, nbd.CMD_FLUSH, 0, 0)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self._request(_fua(fua), nbd.CMD_TRIM, offset, length)

    async def cache(self, offset: int, length: int) -> None:
        await self._request(0, nbd.CMD_CACHE, offset, length)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> None:
        flags = _fua(fua) | (nbd.CMD_FLAG_NO_HOLE if no_hole else 0)
        flags |= nbd.CMD_FLAG_FAST_ZERO if fast else 0
        await self._request(flags, nbd.CMD_WRITE_ZEROES, offset, length)

    async def block_status(self, offset: int, length: int, *, one: bool = False) -> list[Extent]:
        """Tell which parts of a range hold data.

        Shape:    as `BlockNode.map`: may cover only a prefix of the range; with `one` a single extent.
        Needs:    `has_allocation`.
        """
        flags = nbd.CMD_FLAG_REQ_ONE if one else 0
        extents: list[Extent] = []
        for run in (await self._request(flags, nbd.CMD_BLOCK_STATUS, offset, length)).runs:
            extents.append(Extent(offset, run.length, Kind.ZERO if run.flags & nbd.STATE_ZERO else Kind.DATA))
            offset += run.length
        return extents

    async def disconnect(self) -> None:
        """Say goodbye and close; requests still in flight fail. Idempotent."""
        if not self._transport.is_closing():
            self._transport.write(transmission.pack_request(Request(0, nbd.CMD_DISC, 0, 0, 0)))
            self._transport.close()
        await self._closed.wait()

    async def _request(
        self, flags: int, command: int, offset: int, length: int, data: bytes | bytearray | memoryview = b""
    ) -> _Pending:
        await self._is_writable.wait()
        if self._failure is not None:
            raise self._failure
        self._cookie += 1
        request = Request(flags, command, self._cookie, offset, length)
        pending = self._pending[self._cookie] = _Pending(request, self._loop.create_future())
        self._transport.write(transmission.pack_request(request))
        if data:
            self._transport.write(data)
        await pending.done
        return pending

    # -- haggling -----------------------------------------------------------------------------

    async def _choose(self, export_name: str) -> Self:
        try:
            async with asyncio.timeout(HAGGLING_LIMIT_S):
                await self._haggle(export_name)
        except TimeoutError as error:
            self._transport.abort()
            raise PeerError(f"the NBD server was silent for {HAGGLING_LIMIT_S:.0f} s") from error
        except BaseException:
            self._transport.abort()
            raise
        return self

    async def _haggle(self, export_name: str) -> None:
        if not haggling.parse_greeting(await self._take(haggling.GREETING_SIZE)) & nbd.FLAG_FIXED_NEWSTYLE:
            raise PeerError("the NBD server does not speak the fixed newstyle")
        self._transport.write(haggling.pack_client_flags(nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES))
        if (await self._ask(nbd.OPT_STRUCTURED_REPLY))[-1][0] == nbd.REP_ACK:
            meta = MetaOption(export_name, [nbd.BASE_ALLOCATION])
            contexts = await self._ask(nbd.OPT_SET_META_CONTEXT, haggling.pack_meta(meta))
            self.has_allocation = contexts[0][0] == nbd.REP_META_CONTEXT
        replies = await self._ask(nbd.OPT_GO, haggling.pack_go(GoOption(export_name, [])))
        reply, text = replies[-1]
        if reply != nbd.REP_ACK:
            raise RequestError(
                f"The NBD server does not serve '{export_name}': {text.decode(errors='replace')}"
            )
        for reply, data in replies:
            if reply == nbd.REP_INFO and haggling.parse_info_type(data) == nbd.INFO_EXPORT:
                self.info = haggling.parse_info_export(data)
        self._is_transmitting = True

    async def _ask(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return its replies up to the one that ends them."""
        self._transport.write(haggling.pack_option(option, data))
        replies: list[tuple[int, bytes]] = []
        while len(replies) < _REPLY_COUNT_MAX:
            head = haggling.parse_option_reply(await self._take(haggling.OPTION_REPLY_HEADER_SIZE))
            if head.option != option:
                raise PeerError("the NBD server answers an option that was not sent")
            replies.append((head.reply, await self._take(head.length)))
            if head.reply == nbd.REP_ACK or head.reply & nbd.REP_ERROR_BIT:
                return replies
        raise PeerError(f"the NBD server sent more than {_REPLY_COUNT_MAX} replies to one option")

    async def _take(self, length: int) -> bytes:
        while len(self._input) < length:
            if self._failure is not None:
                raise self._failure
            self._has_news.clear()
            await self._has_news.wait()
        data = bytes(self._input[:length])
        del self._input[:length]
        return data

    # -- called by the transport --------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # the base class says less than is true
        self._transport.set_write_buffer_limits(_UNSENT_HIGH)

    def data_received(self, data: bytes) -> None:
        self._input += data
        self._has_news.set()
        if not self._is_transmitting:
            return
        try:
            while used := self._take_reply():
                del self._input[:used]
        except PeerError as error:
            self._failure = error
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._failure = self._failure or StorageError(
            "The connection to the NBD server is closed", errno=errno.ENOTCONN
        )
        for pending in self._pending.values():
            pending.error = self._failure
            pending.finish()
        self._pending.clear()
        self._has_news.set()
        self._is_writable.set()
        self._closed.set()

    def pause_writing(self) -> None:
        self._is_writable.clear()

    def resume_writing(self) -> None:
        self._is_writable.set()

    # -- replies ------------------------------------------------------------------------------

    def _take_reply(self) -> int:
        """Take one complete simple reply or chunk from the input; return its length, 0 if there is none."""
        if len(self._input) < transmission.SIMPLE_REPLY.size:
            return 0
        with memoryview(self._input) as view:
            if transmission.parse_reply_magic(view) == nbd.SIMPLE_REPLY_MAGIC:
                return self._take_simple_reply(view)
            return self._take_chunk(view)

    def _take_simple_reply(self, view: memoryview) -> int:
        error, cookie = transmission.parse_simple_reply(view)
        pending = self._find(cookie)
        head = transmission.SIMPLE_REPLY.size
        length = head + (0 if error else len(pending.data))
        if len(view) < length:
            return 0
        if error:
            pending.fail(error, "")
        else:
            pending.place(pending.request.offset, view[head:length])
        self._finish(cookie)
        return length

    def _take_chunk(self, view: memoryview) -> int:
        if len(view) < transmission.CHUNK.size:
            return 0
        chunk = transmission.parse_chunk(view)
        length = transmission.CHUNK.size + chunk.length
        if len(view) < length:
            return 0
        _apply_chunk(self._find(chunk.cookie), chunk.type, view[transmission.CHUNK.size : length])
        if chunk.flags & nbd.CHUNK_FLAG_DONE:
            self._finish(chunk.cookie)
        return length

    def _find(self, cookie: int) -> _Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise PeerError("the NBD server answers a request that was not sent")
        return pending

    def _finish(self, cookie: int) -> None:
        pending = self._pending[cookie]
        if pending.error is None and pending.covered != len(pending.data):
            raise PeerError("the NBD server answered a read in part only")
        del self._pending[cookie]
        pending.finish()


def _apply_chunk(pending: _Pending, kind: int, payload: memoryview) -> None:
    """Note what one chunk of a reply says."""
    if kind == nbd.CHUNK_OFFSET_DATA:
        pending.place(transmission.parse_data_offset(payload), payload[transmission.OFFSET_SIZE :])
    elif kind == nbd.CHUNK_BLOCK_STATUS:
        _, pending.runs = transmission.parse_block_status(payload)
    elif kind & nbd.CHUNK_ERROR_BIT:
        pending.fail(*transmission.parse_error(payload))
    elif kind == nbd.CHUNK_OFFSET_HOLE:
        pending.covered += transmission.parse_hole(payload)[1]  # the data is made of zeroes already
    elif kind != nbd.CHUNK_NONE:
        raise PeerError(f"the NBD server sent a chunk of unknown type {kind}")


def _fua(fua: bool) -> int:
    return nbd.CMD_FLAG_FUA if fua else 0
