"""Rude clients and held requests: what one client does costs that client only, and is bounded."""

import asyncio
import errno
from pathlib import Path

import pytest

from blockd.errors import StorageError
from blockd.exports.nbd.connection import IN_FLIGHT_MAX, UNSENT_HIGH
from blockd.exports.nbd.memory import MEMORY_MAX, SPARE_MAX, RequestMemory
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
    most = MEMORY_MAX // (32 * MIB)
    async with serving(node, tmp_path) as at, await at.raw() as raw:
        await transmitting(raw)
        raw.reader._transport.pause_reading()  # type: ignore[attr-defined]
        raw.send(b"".join(pack(nbd.CMD_READ, cookie, 0, 32 * MIB) for cookie in range(50)))
        await node.wait_for_waiting(most)
        node.gate.set()
        async with await at.client() as client:
            await client.flush()  # answered after all those replies were, none of which can leave
            await client.flush()
        assert node.log == ["read"] * most + ["flush"] * 2


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


def test_memory_is_reserved_up_to_its_limit() -> None:
    called: list[str] = []
    memory = RequestMemory(limit=100)

    def note() -> None:
        called.append("freed")

    assert memory.reserve(60, first=True, when_freed=note)
    assert not memory.reserve(60, first=False, when_freed=note)
    assert memory.reserve(60, first=True, when_freed=note)  # a first one always is
    assert not called
    memory.release(60)
    assert called == ["freed"]
    assert memory.reserve(40, first=False, when_freed=note)
    assert not memory.reserve(1, first=False, when_freed=note)
    memory.forget(note)
    memory.release(100)
    assert called == ["freed"]
    assert memory.is_idle


def test_lent_buffers_come_back_and_are_few() -> None:
    memory = RequestMemory()
    buffer = memory.lend(MIB)
    assert len(buffer) == MIB
    memory.take_back(buffer)
    assert memory.lend(100 * KIB) is not buffer  # far too large for that
    assert memory.lend(MIB - 1) is buffer
    for _ in range(100):
        memory.take_back(bytearray(MIB))
    assert memory._spare_size == SPARE_MAX


async def test_a_full_memory_lets_every_connection_go_on(node: MemoryNode, tmp_path: Path) -> None:
    node.nowait = False
    node.gate.clear()
    async with serving(node, tmp_path) as at:
        at.server._memory._limit = at.server._memory._free = MIB
        async with await at.client() as client, await at.client() as other, asyncio.TaskGroup() as tasks:
            writes = [tasks.create_task(client.write(0, bytes(MIB))) for _ in range(3)]
            await node.wait_for_waiting(1)
            read = tasks.create_task(other.read(0, MIB))
            await node.wait_for_waiting(2)
            assert not any(task.done() for task in (*writes, read))
            node.gate.set()


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
