"""Block status: what a client is told of a range of the disk, a chunk for each context it has negotiated."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from blockd.block.chain import chain_map
from blockd.block.depth import depths
from blockd.block.node import BlockNode
from blockd.exports.nbd.export import CONTEXTS
from blockd.extents import Kind
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd import transmission as wire
from blockd.wire.nbd.transmission import Request, StatusRun

# How many runs one context says at most; the client asks on from where they end.
RUN_COUNT_MAX = 4096

Tell = Callable[[BlockNode, int, int], Awaitable[Sequence[StatusRun]]]


async def block_status(node: BlockNode, request: Request, contexts: Sequence[str]) -> bytes:
    """Answer a request with what each of the contexts says."""
    await node.catch_up()  # the maps know nothing of what is still in memory
    count = 1 if request.flags & nbd.CMD_FLAG_REQ_ONE else RUN_COUNT_MAX
    chunks = []
    for name in contexts:
        runs = await _runs(_TELLERS[name], node, request.offset, request.offset + request.length, count)
        is_last = name == contexts[-1]
        chunks.append(wire.pack_block_status(request.cookie, CONTEXTS[name], runs, is_last=is_last))
    return b"".join(chunks)


async def _runs(tell: Tell, node: BlockNode, offset: int, end: int, count: int) -> list[StatusRun]:
    """At most `count` runs from `offset` on, neighbours joined."""
    runs: list[StatusRun] = []
    while offset < end:
        for length, flags in await tell(node, offset, end - offset):
            if runs and runs[-1].flags == flags:
                runs[-1] = StatusRun(runs[-1].length + length, flags)
            elif len(runs) == count:
                return runs
            else:
                runs.append(StatusRun(length, flags))
            offset += length
        await asyncio.sleep(0)  # a map that is in memory makes nobody wait; others have their turn
    return runs


async def _allocation(node: BlockNode, offset: int, length: int) -> list[StatusRun]:
    return [
        StatusRun(extent.length, 0 if extent.kind is Kind.DATA else nbd.STATE_HOLE | nbd.STATE_ZERO)
        for extent in await chain_map(node, offset, length)
    ]


async def _depth(node: BlockNode, offset: int, length: int) -> list[StatusRun]:
    return [StatusRun(*run) for run in await depths(node, offset, length)]


_TELLERS: Final[Mapping[str, Tell]] = {nbd.BASE_ALLOCATION: _allocation, nbd.ALLOCATION_DEPTH: _depth}
