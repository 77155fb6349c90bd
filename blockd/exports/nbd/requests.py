"""What the commands of the transmission phase do, when they may take their time.

`refusal` decides whether a request is proper before anything of it is done; `answer` carries a
proper one out. The reads and writes that need no waiting never get here: see `connection.py`.
"""

import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from blockd.block.accounting import Counter, DiskStats, all_guests
from blockd.block.node import BlockNode, Buffer
from blockd.errors import BlockdError
from blockd.exports.nbd.error_table import nbd_error
from blockd.exports.nbd.export import Terms
from blockd.exports.nbd.status import block_status
from blockd.units import MIB
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd import transmission as wire
from blockd.wire.nbd.transmission import Request

_CACHE_CHUNK = 1 * MIB


class Refusal(NamedTuple):
    """Why a request fails: NBD's number, and a sentence."""

    error: int
    text: str


class Command(NamedTuple):
    """What is allowed for one command, and what it does; its result is the reply's data if it has any."""

    name: str
    perform: Callable[[BlockNode, Request, Buffer, Terms], Awaitable[Buffer | None]]
    flags: int = 0
    modifies: bool = False
    has_range: bool = True
    length_max: int = 0xFFFFFFFF
    beyond_end: int = nbd.EINVAL


def refusal(terms: Terms, request: Request) -> Refusal | None:
    """Tell why `request` has to be refused, None when it is proper."""
    command = COMMANDS.get(request.command)
    if command is None:
        return Refusal(nbd.EINVAL, f"unknown command {request.command}")
    if request.flags & ~(command.flags | nbd.CMD_FLAG_FUA):
        return Refusal(nbd.EINVAL, f"flags {request.flags:#x} are not allowed for this command")
    if command.modifies and not terms.export.writable:
        return Refusal(nbd.EPERM, "the export is read-only")
    if request.length > command.length_max:
        return Refusal(nbd.EINVAL, f"{request.length} bytes in one request; at most {command.length_max}")
    if command.has_range and request.offset + request.length > terms.export.root.size:
        return Refusal(command.beyond_end, "the request reaches beyond the end of the disk")
    if request.command == nbd.CMD_BLOCK_STATUS and not (terms.contexts and request.length):
        return Refusal(nbd.EINVAL, "block status needs a negotiated metadata context and a length")
    if request.flags & nbd.CMD_FLAG_FAST_ZERO and not _zeroes_fast(terms.export.root.top, request):
        return Refusal(nbd.ENOTSUP, "this range cannot be zeroed faster than written")
    return None


def _zeroes_fast(node: BlockNode, request: Request) -> bool:
    """Whether zeroing changes tables only: whole clusters, of a format that has them, may be freed."""
    end = request.offset + request.length
    is_aligned = not request.offset % node.cluster_size and (not end % node.cluster_size or end == node.size)
    return node.cluster_size > 1 and is_aligned and not request.flags & nbd.CMD_FLAG_NO_HOLE


def described(request: Request) -> str:
    """Say what a proper request asks for."""
    command = COMMANDS[request.command]
    return (
        f"{command.name} of {request.length} bytes at {request.offset}" if command.has_range else command.name
    )


async def answer(terms: Terms, request: Request, payload: Buffer) -> list[Buffer]:
    """Carry out a proper request and return its reply, in pieces."""
    stats = terms.export.root.stats
    counter = counter_of(stats, request.command)
    started_ns = time.monotonic_ns()
    try:
        reply = await _carried_out(terms, request, payload)
        account(stats, request, started_ns)
        return reply
    except BlockdError as error:
        if counter is not None:
            counter.failed += 1
        export = terms.export
        export.failures.warn("export '%s': %s failed: %s", export.name, described(request), error)
        return refuse(terms, request, Refusal(nbd_error(error), error.message))


def account(stats: DiskStats, request: Request, started_ns: int) -> None:
    """Count a request that is done."""
    counter = counter_of(stats, request.command)
    stats.last_ns = all_guests.last_ns = time.monotonic_ns()
    if counter is not None:
        counter.add(request.length, stats.last_ns - started_ns)
        if counter is stats.write:
            stats.note_write(request.offset + request.length)


def counter_of(stats: DiskStats, command: int) -> Counter | None:
    """Where a request of this command counts, if it does."""
    match command:
        case nbd.CMD_READ:
            return stats.read
        case nbd.CMD_WRITE | nbd.CMD_WRITE_ZEROES:
            return stats.write
        case nbd.CMD_TRIM:
            return stats.unmap
        case nbd.CMD_FLUSH:
            return stats.flush
        case _:
            return None


async def _carried_out(terms: Terms, request: Request, payload: Buffer) -> list[Buffer]:
    command = COMMANDS[request.command]
    data: Buffer | None = None
    if request.length or not command.has_range:
        async with terms.export.root.request() as node:
            if (reason := refusal(terms, request)) is not None:
                return refuse(terms, request, reason)  # the disk was changed while this one waited
            data = await command.perform(node, request, payload, terms)
            if command.modifies and (request.flags & nbd.CMD_FLAG_FUA or terms.export.writethrough):
                await node.flush()
            # FUA is about its own request alone: it neither tells of a loss nor counts as told.
            if request.command == nbd.CMD_FLUSH and terms.export.writable:
                terms.export.root.lost_writes.report(terms.client)
    if request.command == nbd.CMD_READ:
        return _read_reply(terms, request, data)
    return [wire.pack_simple_reply(request.cookie) if data is None else data]


def _read_reply(terms: Terms, request: Request, data: Buffer | None) -> list[Buffer]:
    """Answer a read; without data it was one of no bytes."""
    if not terms.structured:
        return [wire.pack_simple_reply(request.cookie), data or b""]
    if data is None:
        return [wire.pack_done(request.cookie)]
    return [wire.pack_data_header(request.cookie, request.offset, request.length), data]


def refuse_inside(terms: Terms, request: Request) -> list[Buffer]:
    """Answer when the fault is ours; what it is stands in the log."""
    return refuse(terms, request, Refusal(nbd.EIO, "internal error; see the daemon's log"))


def refuse(terms: Terms, request: Request, reason: Refusal) -> list[Buffer]:
    """Answer with an error, and with its text where the client can take one."""
    if terms.structured:
        return [wire.pack_error(request.cookie, reason.error, reason.text)]
    return [wire.pack_simple_reply(request.cookie, reason.error)]


# -- the commands -----------------------------------------------------------------------------


async def _read(node: BlockNode, request: Request, _: Buffer, _terms: Terms) -> Buffer:
    return await node.read(request.offset, request.length)


async def _write(node: BlockNode, request: Request, payload: Buffer, _terms: Terms) -> None:
    await node.write(request.offset, payload)


async def _flush(node: BlockNode, _request: Request, _: Buffer, _terms: Terms) -> None:
    await node.flush()


async def _trim(node: BlockNode, request: Request, _: Buffer, _terms: Terms) -> None:
    await node.discard(request.offset, request.length)


async def _write_zeroes(node: BlockNode, request: Request, _: Buffer, _terms: Terms) -> None:
    unmap = not request.flags & nbd.CMD_FLAG_NO_HOLE
    await node.write_zeroes(request.offset, request.length, unmap=unmap)


async def _cache(node: BlockNode, request: Request, _: Buffer, _terms: Terms) -> None:
    """Read and drop: what can be cached on the way is cached, what is copied on read is copied."""
    end = request.offset + request.length
    for offset in range(request.offset, end, _CACHE_CHUNK):
        await node.read(offset, min(_CACHE_CHUNK, end - offset))


async def _block_status(node: BlockNode, request: Request, _: Buffer, terms: Terms) -> Buffer:
    return await block_status(node, request, terms.contexts)


COMMANDS = {
    nbd.CMD_READ: Command("read", _read, nbd.CMD_FLAG_DF, length_max=nbd.REQUEST_LENGTH_MAX),
    nbd.CMD_WRITE: Command(
        "write", _write, modifies=True, length_max=nbd.REQUEST_LENGTH_MAX, beyond_end=nbd.ENOSPC
    ),
    nbd.CMD_FLUSH: Command("flush", _flush, has_range=False),
    nbd.CMD_TRIM: Command("trim", _trim, modifies=True),
    nbd.CMD_CACHE: Command("cache", _cache, length_max=nbd.REQUEST_LENGTH_MAX),
    nbd.CMD_WRITE_ZEROES: Command(
        "write zeroes",
        _write_zeroes,
        nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO,
        modifies=True,
        beyond_end=nbd.ENOSPC,
    ),
    nbd.CMD_BLOCK_STATUS: Command("block status", _block_status, nbd.CMD_FLAG_REQ_ONE),
}
