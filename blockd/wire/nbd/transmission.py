"""Requests and replies after the haggling.

    request       magic(4) flags(2) command(2) cookie(8) offset(8) length(4) [data of a write]
    simple reply  magic(4) error(4) cookie(8) [data of a read]
    chunk         magic(4) flags(2) type(2) cookie(8) length(4) payload

The server's loop unpacks and packs with the structs themselves (`REQUEST`, `SIMPLE_REPLY`,
`DATA_CHUNK`); the functions are for everything that is not counted in microseconds.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from blockd.errors import PeerError
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd.haggling import Readable

REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
CHUNK: Final = struct.Struct(">IHHQI")
# A chunk of read data up to its payload: the offset is part of the chunk's length.
DATA_CHUNK: Final = struct.Struct(">IHHQIQ")
_HOLE_CHUNK: Final = struct.Struct(">IHHQIQI")
_ERROR: Final = struct.Struct(">IH")
_U32: Final = struct.Struct(">I")
_HOLE: Final = struct.Struct(">QI")
_OFFSET: Final = struct.Struct(">Q")

OFFSET_SIZE: Final = _OFFSET.size
# Texts in error chunks are for people; this is plenty for a sentence.
ERROR_TEXT_MAX: Final = 1024


class Request(NamedTuple):
    """The head of a request."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class Chunk(NamedTuple):
    """The head of one part of a structured reply."""

    flags: int
    type: int
    cookie: int
    length: int


class StatusRun(NamedTuple):
    """How many bytes are in one allocation state: STATE_HOLE, STATE_ZERO."""

    length: int
    flags: int


def pack_request(request: Request) -> bytes:
    return REQUEST.pack(nbd.REQUEST_MAGIC, *request)


def parse_request(data: Readable) -> Request:
    if len(data) < REQUEST.size:
        raise PeerError("a request is shorter than its header")
    magic, *fields = REQUEST.unpack_from(data)
    if magic != nbd.REQUEST_MAGIC:
        raise PeerError("a request does not start with its magic number")
    return Request(*fields)


# -- replies, packed by the server ------------------------------------------------------------


def pack_simple_reply(cookie: int, error: int = 0) -> bytes:
    return SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie)


def pack_data_header(cookie: int, offset: int, length: int) -> bytes:
    """Head a chunk that is the whole answer to a read; `length` bytes of data follow."""
    return DATA_CHUNK.pack(
        nbd.CHUNK_MAGIC, nbd.CHUNK_FLAG_DONE, nbd.CHUNK_OFFSET_DATA, cookie, length + OFFSET_SIZE, offset
    )


def pack_hole(cookie: int, offset: int, length: int) -> bytes:
    """Answer a whole read with zeroes that are not sent."""
    return _HOLE_CHUNK.pack(
        nbd.CHUNK_MAGIC, nbd.CHUNK_FLAG_DONE, nbd.CHUNK_OFFSET_HOLE, cookie, _HOLE.size, offset, length
    )


def pack_done(cookie: int) -> bytes:
    return CHUNK.pack(nbd.CHUNK_MAGIC, nbd.CHUNK_FLAG_DONE, nbd.CHUNK_NONE, cookie, 0)


def pack_error(cookie: int, error: int, text: str) -> bytes:
    message = text.encode()[:ERROR_TEXT_MAX]
    length = _ERROR.size + len(message)
    head = CHUNK.pack(nbd.CHUNK_MAGIC, nbd.CHUNK_FLAG_DONE, nbd.CHUNK_ERROR, cookie, length)
    return head + _ERROR.pack(error, len(message)) + message


def pack_block_status(
    cookie: int, context_id: int, runs: Sequence[StatusRun], *, is_last: bool = True
) -> bytes:
    """Tell what one context says; the reply is complete with the `is_last` one."""
    payload = struct.pack(f">I{2 * len(runs)}I", context_id, *(field for run in runs for field in run))
    flags = nbd.CHUNK_FLAG_DONE if is_last else 0
    return CHUNK.pack(nbd.CHUNK_MAGIC, flags, nbd.CHUNK_BLOCK_STATUS, cookie, len(payload)) + payload


# -- replies, parsed by the client ------------------------------------------------------------


def parse_reply_magic(data: Readable) -> int:
    """Tell a simple reply from a chunk."""
    (magic,) = _U32.unpack_from(data) if len(data) >= _U32.size else (0,)
    if magic not in (nbd.SIMPLE_REPLY_MAGIC, nbd.CHUNK_MAGIC):
        raise PeerError("a reply does not start with a magic number")
    return int(magic)


def parse_simple_reply(data: Readable) -> tuple[int, int]:
    """Return the error and the cookie."""
    _, error, cookie = _unpack(SIMPLE_REPLY, data)
    return error, cookie


def parse_chunk(data: Readable) -> Chunk:
    _, flags, type_, cookie, length = _unpack(CHUNK, data)
    if length > nbd.REQUEST_LENGTH_MAX + OFFSET_SIZE:
        raise PeerError(f"a reply chunk of {length} bytes")
    return Chunk(flags, type_, cookie, length)


def parse_data_offset(payload: Readable) -> int:
    (offset,) = _unpack(_OFFSET, payload)
    return offset


def parse_hole(payload: Readable) -> tuple[int, int]:
    """Return offset and length."""
    offset, length = _unpack(_HOLE, payload)
    return offset, length


def parse_error(payload: Readable) -> tuple[int, str]:
    """Return the error and its text; what a server adds after them is left alone."""
    error, length = _unpack(_ERROR, payload)
    text = bytes(payload[_ERROR.size : _ERROR.size + length]).decode(errors="replace")
    return error, text


def parse_block_status(payload: Readable) -> tuple[int, list[StatusRun]]:
    """Return the context's number and what it says, run by run."""
    run_size = 2 * _U32.size
    count, rest = divmod(len(payload) - _U32.size, run_size)
    if count < 1 or rest:
        raise PeerError(f"a block status of {len(payload)} bytes")
    context_id, *fields = struct.unpack(f">I{2 * count}I", payload)
    return context_id, [StatusRun(*pair) for pair in zip(fields[::2], fields[1::2], strict=True)]


def _unpack(layout: struct.Struct, data: Readable) -> tuple[int, ...]:
    try:
        return layout.unpack_from(data)
    except struct.error as error:
        raise PeerError("a reply is shorter than its contents need") from error
