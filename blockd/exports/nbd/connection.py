"""One client's connection: haggling first, then requests.

The transmission phase is a loop over one receive buffer. A read or write that its node can do
without waiting is done right there, between two bytes of input, and all replies of one turn leave
in one write; nothing is created for such a request but its reply. Any other request becomes a task
that goes through `Root.request()`, and its reply leaves when it is ready, in any order.

What a client can make us hold is bounded: IN_FLIGHT_MAX tasks, their bytes by `RequestMemory`, unsent
replies by the transport's limits, and input by the receive buffer: when it is full, reading stops.
Until then it goes on, so that a client that leaves is noticed.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Mapping
from functools import partial

from blockd.block.node import BlockNode, Buffer
from blockd.errors import BlockdError, PeerError
from blockd.exports.nbd.export import Export, Terms
from blockd.exports.nbd.handshake import Handshake
from blockd.exports.nbd.memory import RequestMemory
from blockd.exports.nbd.polling import Polling
from blockd.exports.nbd.receive_buffer import OwnBuffer, ReceiveBuffer
from blockd.exports.nbd.requests import answer, counter_of, refusal, refuse, refuse_inside
from blockd.extents import Kind
from blockd.units import KIB, MIB
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd import transmission as wire
from blockd.wire.nbd.transmission import Request

log = logging.getLogger(__name__)

IN_FLIGHT_MAX = 16
# Writes from here on are received into a buffer of their own; smaller ones are cheaper to move once.
OWN_BUFFER_MIN = 64 * KIB
# Below this, finding out that a range is a hole costs more than sending it.
HOLE_LENGTH_MIN = 64 * KIB
# What one turn of the loop does before others get theirs, in bytes; a request counts as 4 KiB more.
TURN_MAX = 2 * MIB
_REQUEST_COST = 4 * KIB
# Past the first figure of unsent bytes no further request is taken, until they are down to the second.
UNSENT_HIGH = 4 * MIB
UNSENT_LOW = 1 * MIB
# Pieces of replies up to this size are joined for sending; longer ones are sent from where they are.
_JOIN_MAX = 16 * KIB

_HEADER_SIZE = wire.REQUEST.size


class Connection(asyncio.BufferedProtocol):
    """The server's side of one connection."""

    def __init__(
        self, exports: Mapping[str, Export], memory: RequestMemory, polling: Polling, name: str
    ) -> None:
        self.name = name
        self._memory = memory
        self._polling = polling
        self._loop = asyncio.get_running_loop()
        self._tasks = asyncio.TaskGroup()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._transport: asyncio.Transport
        self._handshake = Handshake(exports)
        self._terms: Terms | None = None
        self._is_structured = False
        self._agreed = asyncio.Event()
        self._closed = asyncio.Event()
        self._received = ReceiveBuffer()
        self._refused: list[Buffer] = []  # the reply to a refused write, until its payload has passed
        self._replies: list[Buffer] = []
        self._unsent = 0  # memory reserved for requests whose replies may not have left yet
        self._is_writable = True
        self._is_scheduled = False
        self._is_leaving = False

    @property
    def export(self) -> Export | None:
        """What the client has chosen; None while it haggles."""
        return self._terms and self._terms.export

    async def run(self, sock: socket.socket, haggling_limit_s: float) -> None:
        """Serve the client on `sock` until it leaves. The supervisor of the connection as a whole.

        Cancel:   closes the connection and cancels its requests; returns when the last one is over.
        """
        try:
            async with self._tasks:
                await self._until_closed(sock, haggling_limit_s)
        except Exception:
            log.exception("NBD connection failed inside: connection=%s", self.name)
        finally:
            self._memory.forget(self._schedule)
            own = self._received.own
            self._memory.release(self._unsent + (own.request.length if own else 0))

    def stop(self) -> None:
        """Make `run` end: the connection is closed and its requests are cancelled."""
        self._agreed.set()
        self._closed.set()

    async def _until_closed(self, sock: socket.socket, haggling_limit_s: float) -> None:
        transport, _ = await self._loop.connect_accepted_socket(lambda: self, sock)
        try:
            async with asyncio.timeout(haggling_limit_s):
                await self._agreed.wait()
            await self._closed.wait()
        except TimeoutError:
            log.info("NBD client took too long to choose an export: connection=%s", self.name)
        finally:
            transport.abort()
            for task in self._in_flight:
                task.cancel()

    # -- called by the transport --------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # the base class says less than is true
        self._transport.set_write_buffer_limits(UNSENT_HIGH, UNSENT_LOW)
        self._advance()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._received.free()

    def buffer_updated(self, nbytes: int) -> None:
        if self._received.add(nbytes):
            self._advance()

    def eof_received(self) -> None:
        self._transport.abort()  # nobody waits any more for what is in flight

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop()

    def pause_writing(self) -> None:
        self._is_writable = False

    def resume_writing(self) -> None:
        self._is_writable = True
        self._schedule()

    # -- one turn -----------------------------------------------------------------------------

    def _schedule(self) -> None:
        """Take another turn soon: one for however many reasons there are."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._advance)

    def _advance(self) -> None:
        """Take what can be taken of the input, and send the replies there are.

        This is the supervisor of what happens without a task: a failure costs this connection.
        """
        self._is_scheduled = False
        if self._transport.is_closing():
            return
        try:
            self._take_input()
        except PeerError as error:
            log.info("NBD client broke the protocol: connection=%s error=%s", self.name, error)
            self._is_leaving = True
        except Exception:
            log.exception("NBD connection failed inside: connection=%s", self.name)
            self._is_leaving = True
        if self._is_leaving:
            self._received.drop()
        if self._received.make_room():
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()
        self._send()
        if self._is_leaving and not self._in_flight:
            self._transport.close()

    def _take_input(self) -> None:
        if self._terms is None:
            self._haggle()
        if self._terms is None or self._is_leaving:
            return
        own = self._received.take_own()
        if own is not None:
            self._do_own(self._terms, own)
        if self._refused:
            self._pass_refused()
        if self._is_writable:
            self._take_timed(self._terms)

    def _send(self) -> None:
        replies = self._replies
        if replies:
            if len(replies[-1]) <= _JOIN_MAX:
                self._transport.write(b"".join(replies))
            else:
                self._transport.writelines(replies)
            replies.clear()
            self._polling.turn_done()
        if self._unsent and self._is_writable:
            self._memory.release(self._unsent)
            self._unsent = 0

    def _haggle(self) -> None:
        handshake, received = self._handshake, self._received
        try:
            received.start += handshake.take(received.view[received.start : received.end])
        finally:
            self._replies += handshake.replies
            handshake.replies.clear()
        self._is_leaving = handshake.is_aborted
        if handshake.terms is not None:
            self._terms = handshake.terms
            self._is_structured = handshake.terms.structured
            self._agreed.set()

    # -- requests that need no waiting --------------------------------------------------------

    def _take_timed(self, terms: Terms) -> None:
        """Take requests, and account for the time of those that are answered at once."""
        stats = terms.export.root.stats
        reads, writes, started_ns = stats.read.operations, stats.write.operations, time.monotonic_ns()
        try:
            self._take_requests(terms)
        finally:
            reads, writes = stats.read.operations - reads, stats.write.operations - writes
            if reads or writes:
                stats.share_time(time.monotonic_ns() - started_ns, reads, writes)

    def _take_requests(self, terms: Terms) -> None:
        """Answer the requests in the buffer that need no waiting, and start the others.

        The hot path: what stands in this loop and in `_at_once` runs some 100,000 times a second.
        """
        node, is_writable = terms.export.root.node, terms.export.writable
        received, data, size, turn = self._received, self._received.data, node.size, TURN_MAX
        unpack_request, stats = wire.REQUEST.unpack_from, terms.export.root.stats
        while received.end - received.start >= _HEADER_SIZE:
            if turn <= 0:
                self._schedule()
                return
            magic, flags, command, cookie, offset, length = unpack_request(data, received.start)
            if magic != nbd.REQUEST_MAGIC:
                raise PeerError("a request does not start with its magic number")
            turn -= length + _REQUEST_COST
            if (
                not flags
                and (command == nbd.CMD_READ or (command == nbd.CMD_WRITE and is_writable))
                and 0 < length <= nbd.REQUEST_LENGTH_MAX
                and offset + length <= size
                and self._at_once(node, command, cookie, offset, length)
            ):
                counter = stats.read if command == nbd.CMD_READ else stats.write
                counter.operations += 1
                counter.byte_count += length
                if command == nbd.CMD_WRITE and offset + length > stats.highest_write:
                    stats.highest_write = offset + length
                continue
            if not self._take_slowly(terms, Request(flags, command, cookie, offset, length)):
                return

    def _at_once(self, node: BlockNode, command: int, cookie: int, offset: int, length: int) -> bool:
        """Do a proper read or write if that needs no waiting; False: nothing was done."""
        received = self._received
        payload = end = received.start + _HEADER_SIZE
        try:
            if command == nbd.CMD_WRITE:
                end += length
                if end > received.end or not node.write_nowait(offset, received.view[payload:end]):
                    return False
                self._replies.append(wire.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie))
            elif self._is_structured and length >= HOLE_LENGTH_MIN and _is_hole(node, offset, length):
                self._replies.append(wire.pack_hole(cookie, offset, length))
            else:
                data = node.read_nowait(offset, length)
                if data is None:
                    return False
                self._replies += (self._read_header(cookie, offset, length), data)
        except BlockdError:
            return False  # the awaitable form meets the same error and reports it
        received.start = end
        return True

    def _read_header(self, cookie: int, offset: int, length: int) -> bytes:
        if self._is_structured:
            return wire.pack_data_header(cookie, offset, length)
        return wire.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie)

    # -- all other requests -------------------------------------------------------------------

    def _take_slowly(self, terms: Terms, request: Request) -> bool:
        """Take the request at the start of the input; False when it has to stay there for now."""
        if request.command == nbd.CMD_DISC:
            self._is_leaving = True
            return False
        reason = refusal(terms, request)
        if reason is not None:
            counter = counter_of(terms.export.root.stats, request.command)
            if counter is not None:
                counter.invalid += 1
            self._refuse(request, refuse(terms, request, reason))
            return True
        payload = self._received.start + _HEADER_SIZE
        end = payload + (request.length if request.command == nbd.CMD_WRITE else 0)
        is_complete = end <= self._received.end
        if not is_complete and request.length < OWN_BUFFER_MIN:
            return False
        if not self._admit(request):
            return False
        if is_complete:
            self._start_request(terms, request, bytes(self._received.view[payload:end]), None)
            self._received.start = end
        else:
            self._received.receive_apart(request, self._memory.lend(request.length), payload)
        return True

    def _admit(self, request: Request) -> bool:
        if len(self._in_flight) >= IN_FLIGHT_MAX:
            return False
        return self._memory.reserve(
            _held_bytes(request), first=not self._in_flight, when_freed=self._schedule
        )

    def _start_request(self, terms: Terms, request: Request, payload: Buffer, lent: bytearray | None) -> None:
        task = self._tasks.create_task(self._serve(terms, request, payload))
        self._in_flight.add(task)
        task.add_done_callback(partial(self._request_done, request, lent))

    async def _serve(self, terms: Terms, request: Request, payload: Buffer) -> None:
        """Carry out a request. The supervisor of a request: a failure inside costs the guest this one."""
        try:
            self._replies += await answer(terms, request, payload)
        except Exception:
            log.exception("NBD request failed inside: connection=%s request=%s", self.name, request)
            self._replies += refuse_inside(terms, request)
        self._schedule()

    def _request_done(self, request: Request, lent: bytearray | None, task: asyncio.Task[None]) -> None:
        """Give back what a request held, however it ended, and take up input that waited for that."""
        self._in_flight.discard(task)
        if lent is not None:
            self._memory.take_back(lent)
        self._unsent += _held_bytes(request)
        if self._unsent or self._received.end or self._is_leaving:
            self._schedule()

    def _do_own(self, terms: Terms, own: OwnBuffer) -> None:
        """Do the write that was received apart."""
        started_ns = time.monotonic_ns()
        if refusal(terms, own.request) is None and self._write_at_once(terms, own):
            stats = terms.export.root.stats
            stats.last_ns = time.monotonic_ns()
            stats.write.add(own.request.length, stats.last_ns - started_ns)
            stats.note_write(own.request.offset + own.request.length)
            self._replies.append(wire.pack_simple_reply(own.request.cookie))
            self._memory.take_back(own.buffer)
            self._unsent += _held_bytes(own.request)
        else:
            self._start_request(terms, own.request, own.payload, own.buffer)

    def _write_at_once(self, terms: Terms, own: OwnBuffer) -> bool:
        if own.request.flags:
            return False
        try:
            return terms.export.root.node.write_nowait(own.request.offset, own.payload)
        except BlockdError:
            return False  # as in _at_once

    def _refuse(self, request: Request, reply: list[Buffer]) -> None:
        """Answer with an error, for a write when its payload has passed."""
        self._received.start += _HEADER_SIZE
        self._received.skip(request.length if request.command == nbd.CMD_WRITE else 0)
        self._refused = reply
        self._pass_refused()

    def _pass_refused(self) -> None:
        if not self._received.is_skipping():
            self._replies += self._refused
            self._refused = []


def _is_hole(node: BlockNode, offset: int, length: int) -> bool:
    return node.kind_nowait(offset, length) is Kind.ZERO


def _held_bytes(request: Request) -> int:
    """What a request holds in memory while it waits."""
    return request.length if request.command in (nbd.CMD_READ, nbd.CMD_WRITE) else 0
