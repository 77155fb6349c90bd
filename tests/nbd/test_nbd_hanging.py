"""Guests that leave a disk which hangs: nothing calls back what is under way; others have their places."""

import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from blockd.aio import in_thread, thread_calls
from blockd.block.guest_memory import GuestMemory
from blockd.exports.nbd import server
from blockd.units import MIB
from blockd.wire.nbd import constants as nbd
from tests.nbd.memory_node import MemoryNode
from tests.nbd.serving import Serving, pack, serving, transmitting, until

LIMIT = 2


@pytest.fixture
def answers() -> Iterator[defaultdict[int, threading.Event]]:
    """When reads are answered, by offset: all of them when a test is over."""
    answers: defaultdict[int, threading.Event] = defaultdict(threading.Event)
    yield answers
    for answer in answers.values():
        answer.set()


@pytest.fixture
async def at(
    node: MemoryNode,
    answers: defaultdict[int, threading.Event],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Serving]:
    """A server whose disk hangs."""

    async def read(offset: int, length: int) -> bytes:
        await in_thread(answers[offset].wait)
        return bytes(length)

    node.nowait = False
    monkeypatch.setattr(node, "read", read)
    async with serving(node, tmp_path, max_connections=LIMIT) as at:
        try:
            yield at
        finally:
            for answer in answers.values():
                answer.set()


async def ask_and_leave(at: Serving, *, count: int = 1, offset: int = 0, also: bytes = b"") -> None:
    before = thread_calls.count
    async with await at.raw() as guest:
        await transmitting(guest)
        guest.send(b"".join(pack(nbd.CMD_READ, number, offset, 4096) for number in range(count)) + also)
        await until(lambda: thread_calls.count >= before + count)


def has_place(at: Serving) -> bool:
    return not at.server._slots.locked()


async def test_who_has_left_takes_no_place(at: Serving) -> None:
    for _ in range(3 * LIMIT):
        await ask_and_leave(at)
    assert at.server.connection_count == 3 * LIMIT, "their requests are under way"
    async with await at.client() as other:
        assert other.size
        await other.write(0, b"another")


@pytest.mark.parametrize(("limit", "left_count"), [("REQUEST_COUNT", 2), ("LENGTH", 1)])
async def test_there_is_a_limit_to_that(
    at: Serving, monkeypatch: pytest.MonkeyPatch, limit: str, left_count: int
) -> None:
    """Each request may keep a thread: many of one client are not like one."""
    monkeypatch.setattr(server, f"LEFT_{limit}_MAX", 4 if limit == "REQUEST_COUNT" else 2 * 4096)
    for _ in range(left_count):
        await ask_and_leave(at, count=2)
    await until(lambda: len(at.server._left) == left_count)
    for _ in range(LIMIT):
        assert has_place(at)
        await ask_and_leave(at, count=2)
    await until(lambda: len(at.server._leaving) == LIMIT)
    assert not has_place(at)


async def test_places_that_could_not_be_freed_are_freed_later(
    at: Serving, answers: defaultdict[int, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When others that have left are gone, though its own disk still hangs."""
    monkeypatch.setattr(server, "LEFT_REQUEST_COUNT_MAX", 1)
    await ask_and_leave(at)
    await until(lambda: len(at.server._left) == 1)
    for _ in range(LIMIT):
        await ask_and_leave(at, offset=4096)
    await until(lambda: len(at.server._leaving) == LIMIT)
    assert not has_place(at)
    answers[0].set()
    await at.until_connections(LIMIT)
    assert (len(at.server._left), len(at.server._leaving)) == (1, 1)
    assert has_place(at)


async def test_who_has_left_holds_nothing_but_what_is_under_way(
    at: Serving, answers: defaultdict[int, threading.Event]
) -> None:
    """Neither what it has sent, nor what that is received into, nor what is done by now."""
    other = pack(nbd.CMD_READ, 98, 4096, 8192)
    part = pack(nbd.CMD_WRITE, 99, 0, MIB) + bytes(1000)
    await ask_and_leave(at, count=2, also=other + part)
    await until(lambda: len(at.server._left) == 1)
    [left] = at.server._left
    assert left.held == 2 * 4096 + 8192
    assert (len(left._received.data), left._received.own) == (0, None)
    answers[4096].set()
    await until(lambda: left.request_count == 2)
    assert left.held == 2 * 4096
    assert not left._replies


async def test_who_has_left_does_not_wait_for_memory(at: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody behind it in the queue would have any, as long as its disk hangs."""
    memory = at.server._memory
    budget, memory.share = GuestMemory(2 * MIB), MIB // 2
    monkeypatch.setattr(memory, "budget", budget)
    async with await at.raw() as staying:
        await transmitting(staying)
        staying.send(pack(nbd.CMD_READ, 1, 0, MIB))
        await until(lambda: budget.spare == MIB // 2)
        async with await at.raw() as guest:
            await transmitting(guest)
            guest.send(pack(nbd.CMD_READ, 1, 0, 4096) + pack(nbd.CMD_READ, 2, 0, 3 * MIB // 2))
            await until(lambda: len(budget._queue) == 1)
        await until(lambda: len(at.server._left) == 1)
        assert not budget._queue
        assert budget.spare == MIB // 2
        async with await at.client() as other:
            await other.write(0, bytes(MIB))


async def test_a_guest_whose_disk_hangs_leaves_others_as_much_memory_as_it_has(
    at: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not before them in the queue, however much it asks for."""
    memory = at.server._memory
    budget, memory.share = GuestMemory(16 * MIB), 0
    monkeypatch.setattr(memory, "budget", budget)
    async with await at.raw() as hanging:
        await transmitting(hanging)
        hanging.send(b"".join(pack(nbd.CMD_READ, number, 0, 2 * MIB) for number in range(8)))
        await until(lambda: budget.free == 4 * MIB)
        async with await at.client() as other:
            for _ in range(4):
                await other.write(0, bytes(4 * MIB))
        assert budget.free == 4 * MIB
