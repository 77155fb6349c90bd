"""One client's connection: bytes in, requests queued or run out of band, replies and events out.

The receiver reads, parses and queues; the executor runs the queue, one request after the other. An
`exec-oob` has a task of its own, which is how those overtake the queue. Nothing is read while the queue is
full or the client does not take its replies; events cannot wait, so they have a bounded send queue.

Large messages are read and written in pieces with others' turns in between. Events that come while a reply
is being written wait for its end.

A browser connects to any port of its own machine and sends what a web page says, commands too, but behind a
request line of HTTP. So a `strict` connection, which is one over TCP, ends with the first thing before its
negotiation that is no JSON object.
"""

import asyncio
import contextlib
import logging
import select
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from blockd.freed_memory import give_back_soon
from blockd.qmp.envelope import greeting, is_out_of_band
from blockd.qmp.events import EventBus
from blockd.qmp.session import Session
from blockd.units import KIB, MIB
from blockd.wire.qmp import Message, Value
from blockd.wire.qmp.writer import PIECE_LENGTH, pack_message, pack_pieces

if TYPE_CHECKING:
    from blockd.wire.qmp.reader import JsonReader

logger = logging.getLogger(__name__)

REQUEST_QUEUE_MAX = 8
# Out-of-band requests under way; none of those takes long.
OUT_OF_BAND_MAX = 8
# A message longer than this has the queue to itself: what a client makes us keep is bounded in bytes too.
LARGE_MESSAGE_LENGTH = MIB
SEND_QUEUE_MAX = 4 * MIB
# A reader this long behind its events is disconnected.
SLOW_READER_GRACE_S = 10.0
# What a leaving client, or the end of the daemon, waits for the last replies to be taken.
FLUSH_TIMEOUT_S = 5.0
# Parsed in one go, without other work in between.
READ_LENGTH = 4 * KIB
_JSON_WHITESPACE = b" \t\r\n"

Context = TypeVar("Context")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _End:
    """Queued after the last request."""


_END: Final = _End()


class Connection(Generic[Context]):
    """Serve one client from greeting to goodbye."""

    def __init__(
        self,
        session: Session[Context],
        events: EventBus,
        streams: Streams,
        *,
        name: str,
        pretty: bool = False,
        negotiation_timeout_s: float | None = None,
        strict: bool = False,
    ) -> None:
        self.name = name
        self._session = session
        self._events = events
        self._reader, self._writer = streams
        self._pretty = pretty
        self._negotiation_timeout_s = negotiation_timeout_s
        self._is_strict = strict
        self._requests: asyncio.Queue[Message | _End] = asyncio.Queue(REQUEST_QUEUE_MAX)
        self._out_of_band = asyncio.Semaphore(OUT_OF_BAND_MAX)
        # Held while a reply is being written; `_held` are the events that wait for its end.
        self._writing = asyncio.Lock()
        self._held: list[bytes] = []
        self._held_length = 0
        self._is_stopping = False
        self._is_behind = False
        self._timers: dict[Callable[[], None], asyncio.TimerHandle] = {}

    async def run(self) -> None:
        """Serve the client until it has left and what it asked is answered.

        Cancel:   also cancels a command that is running for the client.
        Raises:   BlockdError: what parses requests could not be loaded.
        """
        self._write(pack_message(greeting(), pretty=self._pretty))
        if self._negotiation_timeout_s is not None:
            self._after(self._negotiation_timeout_s, self._disconnect_unless_negotiated)
        try:
            reader = await self._session.commands.reader()
            with contextlib.ExitStack() as stack:
                # Before that nobody makes an event for this client, which would load what events are.
                listening = self._events.listening(self._on_event)
                self._session.when_negotiated(lambda: stack.enter_context(listening))
                async with asyncio.TaskGroup() as group:
                    receiver = group.create_task(self._receive(reader))
                    await self._execute()
                    await self._flush()
                    receiver.cancel()
        finally:
            for timer in self._timers.values():
                timer.cancel()
            self._writer.transport.abort()
            with contextlib.suppress(OSError):  # why the client was lost was told to `_receive` already
                await self._writer.wait_closed()

    def stop(self) -> None:
        """Take no more requests: finish the one that runs, send what is queued, then end `run`."""
        self._is_stopping = True
        while not self._requests.empty():
            self._requests.get_nowait()
            self._requests.task_done()
        self._requests.put_nowait(_END)

    async def _receive(self, messages: "JsonReader") -> None:
        """Queue what the client sends until it sends no more; once stopping, only take it off the wire."""
        async with asyncio.TaskGroup() as out_of_band:
            try:
                await self._read(messages, out_of_band)
            except OSError as error:
                logger.debug("QMP client lost: client=%s error=%s", self.name, error)
        if not self._is_stopping:
            await self._requests.put(_END)

    async def _read(self, messages: "JsonReader", out_of_band: asyncio.TaskGroup) -> None:
        length = 0
        has_begun = not self._is_strict
        while data := await self._reader.read(READ_LENGTH):
            # Not left to the parser: a string that does not end is no error yet.
            if not has_begun and (start := data.lstrip(_JSON_WHITESPACE)):
                if not start.startswith(b"{"):
                    self._refuse()
                    return
                has_begun = True
            length += len(data)
            if await self._take_all(messages.feed(data), out_of_band):
                if length > LARGE_MESSAGE_LENGTH:
                    await self._requests.join()
                    give_back_soon()
                length = 0
            await self._drain()
            await asyncio.sleep(0)  # a client that sends without pause must not keep others waiting

    async def _take_all(self, messages: Iterable[Message], out_of_band: asyncio.TaskGroup) -> bool:
        """Take what came at once; whether there was anything."""
        is_any = False
        for message in messages:
            await self._take(message, out_of_band)
            is_any = True
        return is_any

    async def _take(self, message: Message, out_of_band: asyncio.TaskGroup) -> None:
        if self._is_stopping:
            return
        if self._session.oob_enabled and is_out_of_band(message):
            await self._out_of_band.acquire()
            out_of_band.create_task(self._answer_out_of_band(message))
        else:
            await self._requests.put(message)

    async def _answer_out_of_band(self, message: Message) -> None:
        try:
            await self._reply(await self._session.answer(message))
        finally:
            self._out_of_band.release()

    async def _execute(self) -> None:
        while not isinstance(message := await self._requests.get(), _End):
            if self._has_left():
                return
            if self._is_strict and not self._session.is_negotiated and not isinstance(message, dict):
                self._refuse()
                return
            await self._reply(await self._session.answer(message))
            del message  # it may be large, and the next one may be long in coming
            self._requests.task_done()

    def _refuse(self) -> None:
        logger.warning("QMP client sends something else than JSON, disconnecting it: client=%s", self.name)
        self._writer.transport.abort()

    def _has_left(self) -> bool:
        """Tell whether the client closed the connection altogether, not just its sending half."""
        connection = self._writer.get_extra_info("socket")
        if connection is None or self._writer.transport.is_closing():
            return self._writer.transport.is_closing()
        poll = select.poll()
        poll.register(connection.fileno(), 0)
        return bool(poll.poll(0))

    async def _reply(self, message: dict[str, Value]) -> None:
        """Send a reply, and return when the client has taken most of what was sent to it."""
        async with self._writing:
            for piece in pack_pieces(message, pretty=self._pretty):
                self._write(piece)
                await self._drain()
                if len(piece) >= PIECE_LENGTH:
                    await asyncio.sleep(0)
            held, self._held, self._held_length = self._held, [], 0
            for event in held:
                self._write(event)

    def _write(self, data: bytes) -> None:
        if not self._writer.transport.is_closing():
            self._writer.write(data)

    def _unsent_length(self) -> int:
        transport = self._writer.transport
        return 0 if transport.is_closing() else transport.get_write_buffer_size() + self._held_length

    async def _drain(self) -> None:
        """Wait until the client has taken most of what was sent to it."""
        with contextlib.suppress(OSError):
            await self._writer.drain()

    async def _flush(self) -> None:
        """Wait until the client has taken everything, but not for ever."""
        if self._writer.transport.is_closing():
            return
        self._writer.transport.set_write_buffer_limits(0)  # drained only when all is sent
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await self._drain()
        except TimeoutError:
            logger.warning("QMP client did not take its last replies: client=%s", self.name)
            self._writer.transport.abort()

    def _on_event(self, event: dict[str, Value]) -> None:
        if self._unsent_length() < SEND_QUEUE_MAX:
            self._send_event(pack_message(event, pretty=self._pretty))
        elif not self._is_behind:
            logger.warning("QMP client does not read, dropping its events: client=%s", self.name)
            self._is_behind = True
            self._after(SLOW_READER_GRACE_S, self._disconnect_if_behind)

    def _send_event(self, event: bytes) -> None:
        if self._writing.locked():
            self._held.append(event)
            self._held_length += len(event)
        else:
            self._write(event)

    def _disconnect_if_behind(self) -> None:
        self._is_behind = False
        if self._unsent_length() >= SEND_QUEUE_MAX // 2:
            logger.warning("QMP client still does not read, disconnecting it: client=%s", self.name)
            self._writer.transport.abort()

    def _disconnect_unless_negotiated(self) -> None:
        if not self._session.is_negotiated:
            logger.warning("QMP client does not negotiate, disconnecting it: client=%s", self.name)
            self._writer.transport.abort()

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do `action` later, if the client is still there."""
        self._timers[action] = asyncio.get_running_loop().call_later(seconds, action)
