"""What a client has sent and nobody has taken yet, in one buffer that is never replaced.

    data   [ taken | not yet taken | free ]
                 start            end    limit

A write whose payload does not fit is received apart, straight into a buffer of its own.
"""

from blockd.units import KIB
from blockd.wire.nbd.transmission import REQUEST, Request

RECEIVE_BUFFER_SIZE = 256 * KIB


class OwnBuffer:
    """A write that is received apart: where its payload goes, and what is still to come."""

    def __init__(self, request: Request, buffer: bytearray, arrived: memoryview, held: int) -> None:
        self.request = request
        # What is reserved for it, in bytes.
        self.held = held
        self.buffer = buffer
        self.payload = memoryview(buffer)[: request.length]
        self.payload[: len(arrived)] = arrived
        self.rest = self.payload[len(arrived) :]


class ReceiveBuffer:
    """The receive buffer of a connection. The request loop moves `start` itself."""

    def __init__(self) -> None:
        self.data = bytearray(RECEIVE_BUFFER_SIZE)
        self.view = memoryview(self.data)
        self.start = self.end = 0
        self.own: OwnBuffer | None = None
        self._limit = RECEIVE_BUFFER_SIZE
        self._skip = 0

    def free(self) -> memoryview:
        """Where the next bytes go; never empty while `make_room` said that there is room."""
        if self.own is not None:
            return self.own.rest
        return self.view[self.end : self._limit]

    def add(self, count: int) -> bool:
        """Note that `count` bytes came; tell whether there may be something to do with them."""
        if self.own is None:
            self.end += count
            self._limit = RECEIVE_BUFFER_SIZE
            return True
        self.own.rest = self.own.rest[count:]
        return not self.own.rest

    def make_room(self) -> bool:
        """Move what is left to the front; tell whether there is room behind it."""
        rest = self.end - self.start
        if rest and self.start:
            self.view[:rest] = self.view[self.start : self.end]
        self.start, self.end = 0, rest
        return rest < self._limit

    def drop(self) -> None:
        """Forget all there is."""
        self.start = self.end = 0

    def close(self) -> OwnBuffer | None:
        """Let go of the memory when the client has left: what is under way for it may take much longer.

        Returns what was being received apart.
        """
        self.drop()
        own, self.own = self.own, None
        self.data, self.view = bytearray(), memoryview(b"")
        return own

    # -- large payloads -----------------------------------------------------------------------

    def receive_apart(self, request: Request, buffer: bytearray, payload: int, held: int) -> None:
        """Receive the payload that begins at position `payload` into `buffer` from here on."""
        self.own = OwnBuffer(request, buffer, self.view[payload : self.end], held)
        self.start = self.end

    def take_own(self) -> OwnBuffer | None:
        """Hand out the write that was received apart, if all of it is there."""
        own = self.own
        if own is None or own.rest:
            return None
        self.own = None
        # Another large write is likely to follow: read its header alone, so that all of its payload
        # is received where it belongs.
        self._limit = REQUEST.size
        return own

    def skip(self, count: int) -> None:
        """Let the next `count` bytes pass unread."""
        self._skip = count

    def is_skipping(self) -> bool:
        """Skip what is there; tell whether more has to come."""
        count = min(self._skip, self.end - self.start)
        self.start += count
        self._skip -= count
        return self._skip > 0
