"""Nothing holds the event loop for long: not with 500 disks, not on used images, whatever is asked for."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from blockd.protocols.nbd_client import NbdClient
from blockd.units import GIB, KIB, MIB
from tests.daemon_process import DaemonProcess
from tests.many import used_images
from tests.many.watched_daemon import HOLD_S, Hold, holds
from tests.qmp_client import Json, QmpClient

pytestmark = pytest.mark.slow

DISK_COUNT = 500
SNAPSHOT_COUNT = 20
# Where others use the caches, work takes up to twice the processor time. Memory that a virtual machine has
# never used takes longer: 11 to 13 ms for 2 MiB, a table of the largest clusters.
BUSY_FACTOR = 3
# The pauses of a virtual machine count as processor time of whoever had the processor: to blame is what holds
# the loop each time.
ROUND_COUNT = 5
READ_LENGTH = 128 * KIB


class Scene:
    """A daemon with many disks, and what is done to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "holds"
        program = ("-m", "tests.many.watched_daemon", str(self.log))
        words = ("--state-dir", folder / "state", "--http", str(folder / "http"))
        self.daemon = DaemonProcess(folder, *words, program=program)
        self.formats = used_images.make_all(folder)
        self.names = used_images.make_small(folder, DISK_COUNT)
        self.qmp: QmpClient

    async def add(self, name: str, image_format: str = "qcow2") -> None:
        file = {"driver": "file", "filename": str(self.folder / name)}
        await self.qmp.command("blockdev-add", {"driver": image_format, "node-name": name, "file": file})
        if name in used_images.FULL:  # no disk that is exported changes its size
            await self.qmp.command("block_resize", {"node-name": name, "size": used_images.FULL_SIZE + GIB})
        export = {"type": "nbd", "id": name, "node-name": name, "writable": True}
        await self.qmp.command("block-export-add", export)

    @asynccontextmanager
    async def guest(self, name: str) -> AsyncIterator[NbdClient]:
        async with await NbdClient.connect_unix(str(self.daemon.nbd_path), name) as guest:
            yield guest

    @asynccontextmanager
    async def busy_guest(self, name: str, length: int) -> AsyncIterator[None]:
        """A guest that writes all the time, anywhere on its disk, parts of clusters, too."""

        async def write() -> None:
            rng = random.Random(name)
            async with self.guest(name) as guest:
                while True:
                    await guest.write(rng.randrange(guest.size // length) * length, b"g" * length)

        async with AsyncExitStack() as stack:
            task = asyncio.create_task(write())
            stack.callback(task.cancel)
            yield


Step = Callable[[Scene], Awaitable[object]]
STEPS: dict[str, Step] = {}


def step(work: Step) -> Step:
    STEPS[work.__name__.replace("_", " ")] = work
    return work


@step
async def the_first_command(scene: Scene) -> None:
    scene.qmp = await scene.daemon.qmp()
    await scene.qmp.command("query-version")


@step
async def adding_disks(scene: Scene) -> None:
    for name in scene.names:
        await scene.add(name)


@step
async def adding_used_disks_and_resizing_full_ones(scene: Scene) -> None:
    for name, image_format in scene.formats.items():
        await scene.add(name, image_format)


@step
async def queries(scene: Scene) -> None:
    for command in ("query-block", "query-named-block-nodes", "query-block-exports", "query-jobs"):
        assert await scene.qmp.command(command) is not None
    for has_nodes in (False, True):
        await scene.qmp.command("query-blockstats", {"query-nodes": has_nodes})


@step
async def the_status_over_http(scene: Scene) -> None:
    for path in ("/metrics", "/api/status"):
        reader, writer = await asyncio.open_unix_connection(f"{scene.folder}/http")
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert scene.names[-1].encode() in await reader.read()
        writer.close()


@step
async def block_status(scene: Scene) -> None:
    for name in scene.formats:
        async with scene.guest(name) as guest:
            for offset in range(0, guest.size, GIB):
                await guest.block_status(offset, min(GIB, guest.size - offset))


@step
async def reads(scene: Scene) -> None:
    for name in scene.formats:
        async with scene.guest(name) as guest:
            offsets = range(0, used_images.SIZE, 2 * MIB)
            await asyncio.gather(*(guest.read(offset, READ_LENGTH) for offset in offsets))


@step
async def trims_and_zeroes_of_gibibytes(scene: Scene) -> None:
    for name in used_images.FULL:
        async with scene.guest(name) as guest:
            await guest.write(4 * KIB, b"1" * 4 * KIB)
            await guest.trim(0, GIB)
            await guest.flush()
            await guest.write_zeroes(GIB, GIB)
            await guest.flush()


@step
async def small_trims(scene: Scene) -> None:
    async with scene.guest("full-64k") as guest:
        await guest.write_zeroes(2 * GIB, GIB)
        await asyncio.gather(*(guest.trim(number * 64 * KIB, 64 * KIB) for number in range(4096)))
        await guest.flush()


@step
async def streams_beside_guests(scene: Scene) -> None:
    for name in used_images.FRAGMENTED:
        async with scene.busy_guest(name, 4 * KIB), scene.busy_guest(name, 3 * 512):
            await scene.qmp.command("block-stream", {"job-id": name, "device": name})
            assert "error" not in await scene.qmp.event("BLOCK_JOB_COMPLETED", device=name)


@step
async def trims_of_fragments(scene: Scene) -> None:
    for name in used_images.FRAGMENTED:
        async with scene.guest(name) as guest:
            await guest.trim(0, 4 * MIB)
            await guest.write_zeroes(4 * MIB, 4 * MIB)
            await guest.flush()


def _snapshot(scene: Scene, name: str) -> Json:
    file = str(scene.folder / f"{name}-over")
    data = {"node-name": name, "snapshot-file": file, "snapshot-node-name": f"{name}-over"}
    return {"type": "blockdev-snapshot-sync", "data": data}


@step
async def snapshots(scene: Scene) -> None:
    await scene.qmp.command("transaction", {"actions": [_snapshot(scene, scene.names[0])]})
    actions = [_snapshot(scene, name) for name in scene.names[1:SNAPSHOT_COUNT]]
    await scene.qmp.command("transaction", {"actions": actions})


@step
async def many_streams(scene: Scene) -> None:
    names = scene.names[:SNAPSHOT_COUNT]
    for name in names:
        await scene.qmp.command("block-stream", {"job-id": name, "device": f"{name}-over"})
    for name in names:
        assert "error" not in await scene.qmp.event("BLOCK_JOB_COMPLETED", device=name)


# What held the loop, by step and place.
Held = dict[tuple[str, str], Hold]


def too_long(found: list[Hold]) -> list[Hold]:
    return [hold for hold in found if hold.cpu_ms > BUSY_FACTOR * HOLD_S * 1e3]


async def played(folder: Path) -> Held:
    """Do all steps in a new folder; returns what held the loop, by step and place."""
    folder.mkdir()
    scene = Scene(folder)
    held: Held = {}
    async with scene.daemon, AsyncExitStack() as stack:
        seen = len(holds(scene.log))  # nobody is served before
        for what, work in STEPS.items():
            await work(scene)
            await scene.qmp.command("query-version")  # what has sent the last reply is noted after that
            found = holds(scene.log)
            held.update({(what, hold.place): hold for hold in too_long(found[seen:])})
            seen = len(found)
            if what == "adding disks":
                await stack.enter_async_context(scene.busy_guest(scene.names[-1], 4 * KIB))
    return held


async def held_each_time(folder: Path, play: Callable[[Path], Awaitable[Held]]) -> Held:
    """What holds the loop in each of ROUND_COUNT rounds, as it was in the first one."""
    held = await play(folder / "0")
    for number in range(1, ROUND_COUNT):
        if held:
            again = await play(folder / str(number))
            held = {place: hold for place, hold in held.items() if place in again}
    return held


async def test_nothing_holds_the_event_loop(tmp_path: Path) -> None:
    held = await held_each_time(tmp_path, played)
    told = [f"{what}: {hold}" for (what, _), hold in held.items()]
    assert not told, "\n\n".join(told)


# A daemon of which a command takes 50 ms.
SLOW = """
import sys, time
from pathlib import Path
from blockd.jobs.manager import JobManager
from tests.many.watched_daemon import main, watch

def hold(jobs):
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    return iter(())

JobManager.__iter__ = hold
watch(Path(sys.argv.pop(1)))
sys.exit(main())
"""


async def slow_command(folder: Path) -> Held:
    folder.mkdir()
    log = folder / "holds"
    daemon = DaemonProcess(folder, program=("-c", SLOW, str(log)))
    async with daemon:
        async with await daemon.qmp() as client:
            await client.command("query-version")
            await client.command("query-jobs")
            await client.command("query-version")
        return {("a command", hold.place): hold for hold in too_long(holds(log))}


async def test_what_holds_the_event_loop_is_named(tmp_path: Path) -> None:
    held = await held_each_time(tmp_path, slow_command)
    assert ("a command", "query_jobs") in held, "\n\n".join(map(str, held.values()))
    hold = held["a command", "query_jobs"]
    assert hold.cpu_ms >= 50
    assert any("hold" in stack for _, stack in hold.stacks)
