"""The budget for what guests' requests hold: kept by what can wait or do without; never a standstill."""

import asyncio
import random
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from blockd.block.guest_memory import GuestMemory
from blockd.filters import blkstream
from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.conftest import StartDaemon
from tests.inline_threads import steps
from tests.stream.held_source import CLUSTER, rig
from tests.stream.test_staged_writes import keeping

CLUSTER_SIZE = 2 * MIB
# Of the budget, and of what the daemon holds besides.
GROWTH_MAX = 256 * MIB + 96 * MIB
# Buffers for the next requests, and the copy of a few large ones.
BURST_LEFT_MAX = 48 * MIB


async def test_who_waits_has_a_turn_and_one_always_goes_on() -> None:
    memory = GuestMemory(200)  # half of it is common
    memory.reserve(100)
    entered: list[int] = []
    may_leave = asyncio.Event()

    async def merge(length: int) -> None:
        async with memory.reserved(length):
            entered.append(length)
            await may_leave.wait()

    async with asyncio.TaskGroup() as tasks:
        for length in (60, 50, 40):
            tasks.create_task(merge(length))
        await steps(5)
        assert entered == [60]
        memory.release(100)
        await steps(5)
        assert entered == [60]
        may_leave.set()
    assert entered == [60, 50, 40]
    assert memory.free == 100


async def test_a_read_copies_only_if_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = GuestMemory(4 * CLUSTER)
    monkeypatch.setattr(blkstream, "guest_memory", memory)
    async with rig() as scene:
        memory.reserve(1)
        scene.model.check_read(0, bytes(await scene.node.read(0, 512)))
        assert await scene.node._is_missing(0)
        memory.release(1)
        scene.model.check_read(0, bytes(await scene.node.read(0, 512)))
        assert not await scene.node._is_missing(0)
    assert memory.free == memory.limit - memory.shares


async def test_merges_go_on_when_nothing_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = GuestMemory(2 * CLUSTER)
    monkeypatch.setattr(blkstream, "guest_memory", memory)
    async with keeping() as scene:
        memory.reserve(CLUSTER)
        for index in range(0, 8, 2):
            await scene.write(index * CLUSTER + 512, 512)
        scene.source.release()
        await scene.node.flush()
        assert memory.free == 0


@pytest.mark.slow
async def test_small_reads_of_large_clusters_stay_within_the_budget(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """64 connections, 16 reads of 4 KiB each at once, each of another cluster that is copied on read."""
    count = 64 * 16
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        for index in range(count):
            file.seek(index * CLUSTER_SIZE)
            file.write(b"x" * 4 * KIB)
        file.truncate(count * CLUSTER_SIZE)
    size = count * CLUSTER_SIZE
    image = qemu_img.create(
        tmp_path / "a.qcow2", size, f"cluster_size={CLUSTER_SIZE}", backing=base, backing_format="raw"
    )
    below = f"driver=qcow2,node-name=q,file.driver=file,file.filename={image}"
    daemon = await start_daemon(
        *("--blockdev", below, "--blockdev", "driver=copy-on-read,node-name=c,file=q"),
        *("--export", "nbd,id=e,node-name=c,name=vda,writable=on"),
    )
    before = most = daemon.resident_bytes

    async def read(client: NbdClient, index: int) -> None:
        nonlocal most
        data = await client.read(index * CLUSTER_SIZE, 4 * KIB)
        assert bytes(data) == b"x" * 4 * KIB
        most = max(most, daemon.resident_bytes)

    async with AsyncExitStack() as stack:
        connecting = (NbdClient.connect_unix(str(daemon.nbd_path), "vda") for _ in range(64))
        clients = [await stack.enter_async_context(await client) for client in connecting]
        await asyncio.gather(*(read(clients[index % 64], index) for index in range(count)))
    assert most - before < GROWTH_MAX


@pytest.mark.slow
async def test_memory_of_a_burst_of_large_writes_goes_back(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Parts of clusters at both ends, so that they do not go straight from the socket to the file."""
    qemu_img.create(tmp_path / "base.qcow2", 2048 * MIB)
    image = qemu_img.create(tmp_path / "a.qcow2", 2048 * MIB, backing=tmp_path / "base.qcow2")
    daemon = await start_daemon("--device", f"vda={image}")
    before = daemon.resident_bytes
    async with AsyncExitStack() as stack:
        connecting = (NbdClient.connect_unix(str(daemon.nbd_path), "vda") for _ in range(8))
        clients = [await stack.enter_async_context(await client) for client in connecting]
        data = b"x" * (8 * MIB)
        writes = (clients[i % 8].write(i * 9 * MIB + 512, data, fua=True) for i in range(64))
        await asyncio.gather(*writes)
    async with asyncio.timeout(60):
        while daemon.resident_bytes - before > BURST_LEFT_MAX:  # noqa: ASYNC110  (of another process)
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("seed", range(3))
async def test_nobody_waits_for_ever(tmp_path: Path, start_daemon: StartDaemon, seed: int) -> None:
    """Many connections with large and small requests, more than there is room for; all stay to the end."""
    rng = random.Random(seed)
    image = qemu_img.create(tmp_path / "disk.qcow2", 64 * MIB)
    daemon = await start_daemon("--device", f"vda={image}")

    async def ask(client: NbdClient, in_flight: asyncio.Semaphore) -> None:
        length = rng.choice([64 * KIB, MIB, 2 * MIB, 8 * MIB])
        offset = rng.randrange(0, 64 * MIB - length, 4 * KIB)
        async with in_flight:
            if rng.random() < 0.6:
                await client.write(offset, bytes(length), fua=rng.random() < 0.5)
            else:
                await client.read(offset, length)

    async with AsyncExitStack() as stack, asyncio.timeout(100):
        clients = [
            await stack.enter_async_context(await NbdClient.connect_unix(str(daemon.nbd_path), "vda"))
            for _ in range(24)
        ]
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                in_flight = asyncio.Semaphore(8)
                for _ in range(rng.randrange(4, 14)):
                    tasks.create_task(ask(client, in_flight))
