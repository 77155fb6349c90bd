"""Rude clients and held requests: what one client does costs that client only, and is bounded."""

import asyncio
import errno
import gc
import weakref
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from blockd.block.guest_memory import MEMORY_MAX, GuestMemory
from blockd.errors import StorageError
from blockd.exports.nbd import connection as connection_module
from blockd.exports.nbd.connection import IN_FLIGHT_MAX, UNSENT_HIGH, Connection
from blockd.exports.nbd.memory import SPARE_MAX, ConnectionMemory, RequestMemory
from blockd.exports.nbd.receive_buffer import RECEIVE_BUFFER_SIZE
from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB, MIB
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd import transmission
from tests.nbd.memory_node import MemoryNode
from tests.nbd.serving import go, pack, serving, transmitting, until


async def test_a_client_may_leave_after_any_byte_of_a_request(node: MemoryNode, tmp_path: Path) -> None:
    requests = pack(nbd.CMD_READ, 1, 0, 4096) + pack(nbd.CMD_WRITE, 2, 0, 20) + bytes(20)
    async with serving(node, tmp_path) as at:
        for length in range(len(requests) + 1):
            async with await at.raw() as raw:
                raw.send(go() + requests[:length])
        await at.until_connections(0)


@pytest.mark.parametrize("sent", [0, 100, MIB])
async def test_a_client_may_leave_in_a_large_payload(node: MemoryNode, tmp_path: Path, sent: int) -> None:
    async with serving(node, tmp_path) as at:
        async with await at.raw() as raw:
            raw.send(go() + pack(nbd.CMD_WRITE, 1, 0, 2 * MIB) + bytes(sent))
        await at.until_connections(0)
    assert len(node.holes) == node.size // node.cluster_size


class Lent(bytearray):
    """A buffer that can be referred to weakly."""


@pytest.mark.parametrize("sent", [100, MIB], ids=["in a payload", "in flight"])
async def test_memory_of_a_client_that_left_is_freed_without_the_garbage_collector(
    node: MemoryNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    """What is given back to the budget is really there for others: the collector may come much later."""
    lent: list[weakref.ref[Lent]] = []

    def lend(_memory: RequestMemory, length: int) -> bytearray:
        buffer = Lent(length)
        lent.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(RequestMemory, "lend", lend)
    monkeypatch.setattr(RequestMemory, "take_back", lambda *_: None)  # none is kept for the next write
    node.nowait = False
    node.gate.clear()
    gc.disable()
    try:
        async with serving(node, tmp_path) as at:
            async with await at.raw() as raw:
                raw.send(go() + pack(nbd.CMD_WRITE, 1, 0, MIB) + bytes(sent))
                await (node.wait_for_waiting(1) if sent == MIB else until(lambda: bool(lent)))
            await at.until_connections(0)
            await until(lambda: not any(buffer() for buffer in lent))
            assert len(lent) == 1
    finally:
        gc.enable()


async def test_requests_of_a_client_that_left_are_cancelled(node: MemoryNode, tmp_path: Path) -> None:
    node.nowait = False
    node.gate.clear()
    async with serving(node, tmp_path) as at:
        async with await at.raw() as raw:
            raw.send(go() + pack(nbd.CMD_READ, 1, 0, 4096) + pack(nbd.CMD_WRITE, 2, 0, MIB) + bytes(MIB))
            await node.wait_for_waiting(2)
        await at.until_connections(0)
        assert node.waiting == 0


async def test_a_client_that_leaves_while_its_requests_are_held_is_noticed(
    node: MemoryNode, tmp_path: Path
) -> None:
    node.nowait = False
    node.gate.clear()
    async with serving(node, tmp_path) as at:
        async with await at.raw() as raw:
            raw.send(go() + b"".join(pack(nbd.CMD_READ, cookie, 0, 512) for cookie in range(100)))
            await node.wait_for_waiting(IN_FLIGHT_MAX)
        await at.until_connections(0)


@pytest.mark.parametrize("garbage", [b"x" * 28, bytes(28), b"\x25\x60\x95\x14" + bytes(24)])
async def test_garbage_closes_only_its_own_connection(
    node: MemoryNode, tmp_path: Path, garbage: bytes
) -> None:
    async with serving(node, tmp_path) as at, await at.client() as client:
        async with await at.raw() as raw:
            await transmitting(raw)
            raw.send(pack(nbd.CMD_FLUSH, 1, 0, 0) + garbage)
            assert await raw.rest() == transmission.pack_simple_reply(1)
        assert await client.read(0, 1) == b"\0"


async def test_a_refused_write_is_answered_after_its_payload(tmp_path: Path) -> None:
    """Otherwise the payload would be taken for requests."""
    node = MemoryNode(MIB, read_only=True)
    requests = pack(nbd.CMD_READ, 2, 0, 1)
    async with serving(node, tmp_path, writable=False) as at, await at.raw() as raw:
        await transmitting(raw)
        for length in (28, 4096, 40 * MIB):
            raw.send(pack(nbd.CMD_WRITE, 1, 0, length) + requests + bytes(length - 28) + requests)
            error = nbd.EPERM
            expected = transmission.pack_simple_reply(1, error) + transmission.pack_simple_reply(2) + b"\0"
            assert await raw.receive(len(expected)) == expected


# -- requests that wait -----------------------------------------------------------------------


async def test_held_requests_hold_nobody_else(node: MemoryNode, tmp_path: Path) -> None:
    node.gate.clear()
    async with (
        serving(node, tmp_path) as at,
        await at.client() as client,
        await at.client() as other,
        asyncio.TaskGroup() as tasks,
    ):
        flush = tasks.create_task(client.flush())
        await node.wait_for_waiting(1)
        await client.write(0, b"first")
        assert await client.read(0, 5) == b"first"
        assert await other.read(0, 5) == b"first"
        assert not flush.done()
        node.gate.set()


async def test_at_most_so_many_requests_are_in_flight(node: MemoryNode, tmp_path: Path) -> None:
    node.nowait = False
    node.gate.clear()
    async with serving(node, tmp_path) as at, await at.client() as client, asyncio.TaskGroup() as tasks:
        reads = [tasks.create_task(client.read(index * 512, 512)) for index in range(100)]
        await node.wait_for_waiting(IN_FLIGHT_MAX)
        async with await at.client() as other:  # two round trips later nothing more has begun
            assert other.size == node.size
        assert node.waiting == IN_FLIGHT_MAX
        node.gate.set()
        await asyncio.gather(*reads)
    assert node.waiting_most == IN_FLIGHT_MAX


async def test_a_drained_root_lets_no_request_through(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path) as at, await at.client() as client, asyncio.TaskGroup() as tasks:
        async with at.root.drained():
            requests = [
                tasks.create_task(client.write(0, b"held")),
                tasks.create_task(client.read(MIB, 4)),
                tasks.create_task(client.flush()),
                tasks.create_task(client.write(2 * MIB, b"x" * MIB)),
            ]
            with pytest.raises(StorageError):
                await client.read(node.size, 1)  # answered: so all before it was taken
            assert node.log == []
            assert node.data[:4] == bytes(4)
            assert not any(request.done() for request in requests)
            other = MemoryNode(node.size)
            at.root.replace(other)
        await asyncio.gather(*requests)
        assert other.data[:4] == b"held"
        assert node.log == []


async def test_drained_waits_for_a_request_in_flight(node: MemoryNode, tmp_path: Path) -> None:
    node.gate.clear()
    async with serving(node, tmp_path) as at, await at.client() as client, asyncio.TaskGroup() as tasks:
        flush = tasks.create_task(client.flush())
        await node.wait_for_waiting(1)

        async def drain() -> bool:
            async with at.root.drained():
                return node.waiting == 0

        drained = tasks.create_task(drain())
        await asyncio.sleep(0)
        assert not drained.done()
        node.gate.set()
        assert await drained
        await flush


async def test_a_client_that_does_not_read_is_bounded_and_stalls_nobody(tmp_path: Path) -> None:
    node = MemoryNode(2 * MIB)
    node.holes.clear()
    count = 0
    read_nowait = node.read_nowait

    def counting(offset: int, length: int) -> object:
        nonlocal count
        count += length
        return read_nowait(offset, length)

    node.read_nowait = counting  # type: ignore[method-assign,assignment]
    async with serving(node, tmp_path) as at, await at.raw() as raw:
        await transmitting(raw)
        raw.reader._transport.pause_reading()  # type: ignore[attr-defined]
        raw.send(b"".join(pack(nbd.CMD_READ, cookie, 0, MIB) for cookie in range(200)))
        async with await at.client() as client:
            await until(lambda: count > UNSENT_HIGH)
            for _ in range(20):
                assert await client.read(0, 1) == b"\0"
        assert count <= UNSENT_HIGH + 4 * MIB
        raw.reader._transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(200):
            await raw.receive(16 + MIB)


async def test_replies_to_waiting_requests_are_bounded_too(tmp_path: Path) -> None:
    node = MemoryNode(33 * MIB, cluster_size=MIB)
    node.nowait = False
    node.gate.clear()
    async with serving(node, tmp_path) as at, await at.raw() as raw:
        most = at.server._memory.budget.free // 2 // (32 * MIB)  # others have as much
        await transmitting(raw)
        raw.reader._transport.pause_reading()  # type: ignore[attr-defined]
        raw.send(b"".join(pack(nbd.CMD_READ, cookie, 0, 32 * MIB) for cookie in range(50)))
        await node.wait_for_waiting(most)
        node.gate.set()
        async with await at.client() as client:
            await client.flush()  # answered after all those replies were, none of which can leave
            await client.flush()
        assert node.log == ["read"] * most + ["flush"] * 2


@pytest.mark.parametrize(("length", "turn_count"), [(64 * KIB, 8), (4 * KIB, 1)])
async def test_long_requests_end_a_turn_that_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, turn_count: int
) -> None:
    """They may: memory that was never used takes long. Of short ones there is a count."""
    monkeypatch.setattr(connection_module, "TURN_MAX_NS", 0)
    node = MemoryNode(MIB)
    node.holes.clear()
    turns: list[int] = []
    take = Connection._take_requests

    def counted(self: Connection, *arguments: Any) -> None:
        before = self._received.start
        take(self, *arguments)
        if self._received.start != before:
            turns.append(self._received.start)

    async with serving(node, tmp_path) as at, await at.raw() as raw:
        await transmitting(raw)
        monkeypatch.setattr(Connection, "_take_requests", counted)
        raw.send(b"".join(pack(nbd.CMD_READ, cookie, 0, length) for cookie in range(8)))
        await raw.receive(8 * (16 + length))
    assert len(turns) == turn_count


async def test_input_is_not_read_without_bound(node: MemoryNode, tmp_path: Path) -> None:
    node.nowait = False
    node.gate.clear()
    async with serving(node, tmp_path) as at, await at.raw() as raw:
        await transmitting(raw)
        raw.send(b"".join(pack(nbd.CMD_FLUSH, cookie, 0, 0) for cookie in range(30_000)))
        await node.wait_for_waiting(IN_FLIGHT_MAX)
        (connection,) = at.server._connections
        await until(lambda: connection._received.end == RECEIVE_BUFFER_SIZE)
        assert raw.writer.transport.get_write_buffer_size() > 0
        node.gate.set()
        await raw.receive(30_000 * 16)


# -- memory -----------------------------------------------------------------------------------


def connections(count: int, budget: GuestMemory, called: list[int]) -> list[ConnectionMemory]:
    memory = RequestMemory(count, budget)
    return [ConnectionMemory(memory, partial(called.append, number)) for number in range(count)]


def test_a_share_is_there_whatever_others_hold() -> None:
    called: list[int] = []
    budget = GuestMemory(400)  # 50 a connection, 200 for all
    one, other, third, fourth = connections(4, budget, called)
    assert one.try_take(250)
    assert (budget.free, one.room) == (0, 0)
    assert other.try_take(30) and other.try_take(20)
    assert not other.try_take(1)
    assert third.room == 50
    other.change(-20)
    assert other.try_take(20)  # from its share again, which it need not wait for
    one.change(-250)
    assert called == []
    assert fourth.room == 250
    for each in (one, other, third, fourth):
        each.close()
    assert (budget.free, budget.spare) == (200, 200)


def test_large_and_small_ones_have_their_turn() -> None:
    called: list[int] = []
    budget = GuestMemory(400)
    one, large, small, gone = connections(4, budget, called)
    assert one.try_take(150)
    assert not large.try_take(200)
    assert not gone.try_take(300)
    assert not small.try_take(60), "there is room, but others have waited for longer"
    assert small.try_take(50), "its own share"
    assert (budget.spare, small.room) == (0, 0)
    gone.close()
    assert called == []
    one.change(-60)
    assert called == [1]
    assert not small.try_take(10)
    assert large.try_take(200)
    assert called == [1, 2]
    assert small.try_take(10)
    assert called == [1, 2]


def test_one_request_goes_on_without_room_and_no_other() -> None:
    called: list[int] = []
    budget = GuestMemory(400)
    one, other, third, _ = connections(4, budget, called)
    budget.reserve(200)  # for what nobody knows when it is given back
    assert one.try_take(1000)
    assert not other.try_take(51)
    assert not third.try_take(1000)
    assert budget.free == -950
    one.change(-1000)
    assert called == [1]
    assert other.try_take(51)
    assert called == [1, 2]
    assert not third.try_take(1000)
    other.close()
    assert called == [1, 2, 2]
    assert third.try_take(1000)


def test_lent_buffers_come_back_and_are_few() -> None:
    memory = RequestMemory(1)
    buffer = memory.lend(MIB)
    assert len(buffer) == MIB
    memory.take_back(buffer)
    assert memory.lend(100 * KIB) is not buffer  # far too large for that
    assert memory.lend(MIB - 1) is buffer
    for _ in range(100):
        memory.take_back(bytearray(MIB))
    assert memory._spare_size == SPARE_MAX


@pytest.mark.parametrize("is_at_once", [False, True])
async def test_many_large_requests_stay_within_the_budget(tmp_path: Path, *, is_at_once: bool) -> None:
    """64 guests that ask for 16 times 32 MiB and take no reply; one that asks for little is served."""
    node = MemoryNode(32 * MIB)
    node.holes.clear()
    node.nowait = is_at_once
    node.gate.clear()
    async with serving(node, tmp_path) as at, AsyncExitStack() as stack:
        memory = at.server._memory
        small = await stack.enter_async_context(await at.client())
        for _ in range(64):
            raw = await stack.enter_async_context(await at.raw())
            await transmitting(raw)
            raw.reader._transport.pause_reading()  # type: ignore[attr-defined]
            raw.send(b"".join(pack(nbd.CMD_READ, cookie, 0, 32 * MIB) for cookie in range(16)))

        def stuck_count() -> int:
            return sum(
                connection._unsent > UNSENT_HIGH or connection._is_refused_memory
                for connection in at.server._connections
            )

        await until(lambda: stuck_count() == 64)
        node.nowait = True
        assert await small.read(0, 4 * KIB) == bytes(4 * KIB)
        assert MEMORY_MAX // 4 < memory._held <= MEMORY_MAX
        assert memory.budget.free >= 0


async def test_writes_that_need_a_share_each_go_on_when_the_rest_is_taken(tmp_path: Path) -> None:
    """Nobody waits for one who waits: each has its share, whatever others hold, and however long."""
    node = MemoryNode(32 * MIB)
    async with serving(node, tmp_path) as at, AsyncExitStack() as stack:
        budget = at.server._memory.budget
        budget.reserve(budget.free)
        node.nowait = False
        clients = [await stack.enter_async_context(await at.client()) for _ in range(8)]
        await asyncio.gather(*(client.write(0, bytes(MIB)) for client in clients for _ in range(16)))
        await asyncio.gather(*(client.write(0, bytes(32 * MIB)) for client in clients))
        assert node.log.count("write") == 8 * 17
        budget.release(budget.limit - budget.shares)


async def test_a_lost_connection_fails_every_request_of_the_client(node: MemoryNode, tmp_path: Path) -> None:
    node.nowait = False
    node.gate.clear()
    async with serving(node, tmp_path) as at, await at.client() as client, asyncio.TaskGroup() as tasks:
        reads = [tasks.create_task(lost(client)) for _ in range(2)]
        await node.wait_for_waiting(2)
        await at.server.close()
        await asyncio.gather(*reads)
        await lost(client)


async def lost(client: NbdClient) -> None:
    with pytest.raises(StorageError) as caught:
        await client.read(0, 512)
    assert caught.value.errno == errno.ENOTCONN
