"""One client's connection: haggling first, then requests.

The transmission phase is a loop over one receive buffer. A read or write that its node can do
without waiting is done right there, between two bytes of input, and all replies of one turn leave
in one write; nothing is created for such a request but its reply. Any other request becomes a task
that goes through `Root.request()`, and its reply leaves when it is ready, in any order.

What a client can make us hold is bounded: IN_FLIGHT_MAX tasks, the bytes of requests and of replies that have
not left by `ConnectionMemory`, and input by the receive buffer: when it is full, reading stops. Until then it
goes on, so that a client that leaves is noticed.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial

from blockd.block.chain import unfiltered
from blockd.block.node import BlockNode, Buffer
from blockd.errors import BlockdError, PeerError
from blockd.exports.nbd.export import Export, Terms
from blockd.exports.nbd.handshake import Handshake
from blockd.exports.nbd.memory import ConnectionMemory, RequestMemory
from blockd.exports.nbd.polling import Polling
from blockd.exports.nbd.receive_buffer import OwnBuffer, ReceiveBuffer
from blockd.exports.nbd.requests import (
    answer,
    counter_of,
    described,
    refusal,
    refuse,
    refuse_inside,
)
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
# What one turn of the loop does before others get theirs, in bytes; a request counts as 4 KiB more, and one
# that starts a task or changes maps as 24 KiB more still.
TURN_MAX = 2 * MIB
TURN_MAX_NS = 2_000_000
# From this length on requests may take long enough to look at the clock.
_CLOCKED_LENGTH = 32 * KIB
_REQUEST_COST = 4 * KIB
_SLOW_REQUEST_COST = 24 * KIB
# Past the first figure of unsent bytes no further request is taken, until they are down to the second, or to
# what the connection may hold whatever others do: that is what may not be given back while nothing comes.
UNSENT_HIGH = 4 * MIB
UNSENT_LOW = 1 * MIB
# Pieces of replies up to this size are joined for sending; longer ones are sent from where they are.
_JOIN_MAX = 16 * KIB

_HEADER_SIZE = wire.REQUEST.size


class Connection(asyncio.BufferedProtocol):
    """The server's side of one connection."""

    def __init__(
        self,
        exports: Mapping[str, Export],
        memory: RequestMemory,
        polling: Polling,
        name: str,
        when_left: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._when_left = when_left
        self._memory = memory
        self._held = ConnectionMemory(memory, self._schedule)
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
        self._unsent = 0  # what is held for replies that may not have left yet
        self._is_scheduled = False
        self._is_refused_memory = False  # this turn has ended because a request has no room
        self._is_leaving = False
        self._has_left = False

    @property
    def held(self) -> int:
        """How many bytes its requests and replies hold."""
        return self._held.held

    @property
    def request_count(self) -> int:
        """How many of its requests are under way."""
        return len(self._in_flight)

    @property
    def export(self) -> Export | None:
        """What the client has chosen; None while it haggles."""
        return self._terms and self._terms.export

    async def run(self, sock: socket.socket, haggling_limit_s: float) -> None:
        """Serve the client on `sock` until it leaves. The supervisor of the connection as a whole.

        Cancel:   closes the connection and cancels its requests; returns when the last one is over.
        """
        try:
            try:
                async with self._tasks:
                    await self._until_closed(sock, haggling_limit_s)
            finally:
                if self.export is not None:
                    self.export.root.lost_writes.leave(self._handshake)
                self._received.close()
                self._replies.clear()
                self._held.close()
        except Exception:
            log.exception("NBD connection failed inside: connection=%s", self.name)

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
        low = min(UNSENT_LOW, self._memory.share)
        self._transport.set_write_buffer_limits(low, low)
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
        self._has_left = True
        own = self._received.close()
        self._held.wait_no_more()  # whoever is behind it in the queue would wait for a disk that may hang
        self._held.change(-self._unsent - (0 if own is None else own.held))
        self._unsent = 0
        self._replies.clear()
        self._when_left()

    def pause_writing(self) -> None:
        pass  # `_send` looks at what is left

    def resume_writing(self) -> None:
        self._send()
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
        self._is_refused_memory = False
        if self._unsent <= UNSENT_HIGH:
            self._take_timed(self._terms)
        if not self._is_refused_memory:
            # What waited may have been answered at once: whoever is first in the queue has to ask again.
            self._held.wait_no_more()

    def _send(self) -> None:
        replies = self._replies
        if replies:
            if len(replies[-1]) <= _JOIN_MAX:
                self._transport.write(b"".join(replies))
            else:
                self._transport.writelines(replies)
            replies.clear()
            self._polling.turn_done()
        left = self._transport.get_write_buffer_size()
        if left != self._unsent:
            self._held.change(left - self._unsent)
            if left < self._unsent and self._received.end:
                self._schedule()  # what waited in the input may go on
            self._unsent = left

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
        before, started_ns = stats.done_at_once(), time.monotonic_ns()
        try:
            self._take_requests(terms, started_ns + TURN_MAX_NS)
        finally:
            stats.share_time(time.monotonic_ns() - started_ns, before)

    def _take_requests(self, terms: Terms, end_ns: int) -> None:
        """Answer the requests in the buffer that need no waiting, and start the others.

        A turn has a length, and one with long requests ends at `end_ns` of the monotonic clock, too: memory
        that was never used before takes ten times as long.

        The hot path: what stands in this loop and in `_at_once` runs some 100,000 times a second.
        """
        node, is_writable = terms.export.root.node, terms.export.writable and not terms.export.writethrough
        received, data, size = self._received, self._received.data, node.size
        # So what is answered at once never exceeds the room for replies that do not leave at once.
        room = self._held.room // 2
        turn, length_max = min(TURN_MAX, max(1, room)), min(nbd.REQUEST_LENGTH_MAX, room)
        unpack_request, stats = wire.REQUEST.unpack_from, terms.export.root.stats
        counters = {nbd.CMD_READ: stats.read}
        if is_writable:
            counters |= {
                nbd.CMD_WRITE: stats.write,
                nbd.CMD_TRIM: stats.unmap,
                nbd.CMD_WRITE_ZEROES: stats.write,
            }
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
                and command in counters
                and 0 < length <= length_max
                and offset + length <= size
                and self._at_once(node, command, cookie, offset, length)
            ):
                counter = counters[command]
                counter.operations += 1
                counter.byte_count += length
                if counter is stats.write and offset + length > stats.highest_write:
                    stats.highest_write = offset + length
                if length >= _CLOCKED_LENGTH and time.monotonic_ns() >= end_ns:
                    turn = 0
                continue
            if not self._take_slowly(terms, Request(flags, command, cookie, offset, length)):
                return
            turn -= _SLOW_REQUEST_COST

    def _at_once(self, node: BlockNode, command: int, cookie: int, offset: int, length: int) -> bool:
        """Do a proper request if that needs no waiting; False: nothing was done."""
        received = self._received
        payload = end = received.start + _HEADER_SIZE
        try:
            if command == nbd.CMD_WRITE:
                end += length
                if end > received.end or not node.write_nowait(offset, received.view[payload:end]):
                    return False
                self._replies.append(wire.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie))
            elif command != nbd.CMD_READ:
                zero = node.discard_nowait if command == nbd.CMD_TRIM else node.write_zeroes_nowait
                if not zero(offset, length):
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
        held = _held_bytes(terms.export.root.top, request)
        if not self._admit(held):
            return False
        if is_complete:
            self._start_request(terms, request, bytes(self._received.view[payload:end]), None, held)
            self._received.start = end
        else:
            self._received.receive_apart(request, self._memory.lend(request.length), payload, held)
        return True

    def _admit(self, held: int) -> bool:
        if len(self._in_flight) >= IN_FLIGHT_MAX:
            return False
        self._is_refused_memory = not self._held.try_take(held)
        return not self._is_refused_memory

    def _start_request(
        self, terms: Terms, request: Request, payload: Buffer, lent: bytearray | None, held: int
    ) -> None:
        task = self._tasks.create_task(self._serve(terms, request, payload))
        self._in_flight.add(task)
        task.add_done_callback(partial(self._request_done, held, lent))

    async def _serve(self, terms: Terms, request: Request, payload: Buffer) -> None:
        """Carry out a request. The supervisor of a request: a failure inside costs the guest this one."""
        try:
            self._replies += await answer(terms, request, payload)
        except Exception:
            log.exception("connection %s: %s failed inside", self.name, described(request))
            self._replies += refuse_inside(terms, request)
        self._schedule()

    def _request_done(self, held: int, lent: bytearray | None, task: asyncio.Task[None]) -> None:
        """Give back what a request held, however it ended, and take up input that waited for that."""
        self._in_flight.discard(task)
        if lent is not None:
            self._memory.take_back(lent)
        if self._has_left:  # others may hang
            self._replies.clear()
            self._held.change(-held)
            return
        self._unsent += held
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
            self._unsent += own.held
        else:
            self._start_request(terms, own.request, own.payload, own.buffer, own.held)

    def _write_at_once(self, terms: Terms, own: OwnBuffer) -> bool:
        if own.request.flags or terms.export.writethrough:
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


def _held_bytes(node: BlockNode, request: Request) -> int:
    """What a request holds in memory while it waits; of a write, also the edges of clusters it copies."""
    if request.command == nbd.CMD_READ:
        return request.length
    length = request.length if request.command == nbd.CMD_WRITE else 0
    size, end = node.cluster_size, request.offset + request.length
    if request.command not in (nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES) or unfiltered(node).backing is None:
        return length
    return length + size * len({position // size for position in (request.offset, end) if position % size})
