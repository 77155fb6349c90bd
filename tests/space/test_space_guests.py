"""How much room an image takes when guests are at work beside the copying.

Then another process copies, to places that are not shared with guests' writes, and are taken before anybody
has looked for zeroes: what they are not needed for has to go back. A place begins at a multiple of 2 MiB.
What stays free in front of some, for guests' writes to come, makes the file longer, and takes no space.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import pytest

from blockd.protocols.folios import FOLIO_LENGTH_MAX
from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB
from tests.daemon_process import DaemonProcess
from tests.filesystems import FOLDER
from tests.qmp_client import QmpClient, QmpError
from tests.space.drawing import SHAPES, SIZE
from tests.space.scene import DIRECT, Case, Disk, Scene

# Other shapes are copied by threads, which beside guests use the same places.
COPIED_APART = [shape for shape in SHAPES if shape.name in ("qcow2", "qed", "qed-4k")]
CASES = [
    pytest.param(
        Case(shape, place, DIRECT),
        id=f"{shape}-{place}",
        marks=[] if (shape, place) == (SHAPES[0], FOLDER) else pytest.mark.slow,
    )
    for shape in SHAPES
    for place in ((FOLDER, "ext4", "xfs", "btrfs") if shape.name in ("qcow2", "qed") else (FOLDER,))
    if shape.image_format in ("qcow2", "qed")
]
WRITE_LENGTH = 4 * KIB
FLUSH_INTERVAL = 8
# On a busy machine copies would be short ones, which threads make.
PATIENCE = ("--guest-latency", "1000000")
# What copies at once may have passed over.
GAP_LENGTH = 4 * FOLIO_LENGTH_MAX


@contextlib.asynccontextmanager
async def beside_guests(daemon: DaemonProcess, disks: list[Disk]) -> AsyncIterator[QmpClient]:
    """A session with a daemon whose guests are at work: they write what is there anyway."""
    async with await daemon.qmp() as client, contextlib.AsyncExitStack() as guests:
        connections = [
            await guests.enter_async_context(await NbdClient.connect_unix(str(daemon.nbd_path), disk.name))
            for disk in disks
        ]
        async with asyncio.TaskGroup() as tasks:
            working = [
                tasks.create_task(work(guest, disk)) for guest, disk in zip(connections, disks, strict=True)
            ]
            yield client
            for task in working:
                task.cancel()
        for guest in connections:
            await guest.flush()


async def work(guest: NbdClient, disk: Disk) -> None:
    """Read and write the start of stretches with data, from the disk's end, and flush now and then."""
    has_data = bool(disk.pattern.data_length)
    starts = reversed(range(0, SIZE, disk.pattern.stretch_length))
    for number, start in enumerate(itertools.cycle(starts)):
        data = await guest.read(start, WRITE_LENGTH)
        if has_data:
            await guest.write(start, data)
        if number % FLUSH_INTERVAL == 0:
            await guest.flush()
        await asyncio.sleep(0.01)  # a guest that leaves the machine to the copying, too


async def stream_half(scene: Scene, client: QmpClient, daemon: DaemonProcess) -> list[str]:
    running = await scene.stream_half(client)
    assert bool(daemon.copiers()) == (scene.case.shape in COPIED_APART)
    return running


@pytest.mark.parametrize("scene", CASES, indirect=True)
async def test_a_streamed_image_takes_what_its_data_need(scene: Scene) -> None:
    await scene.make_images()
    async with scene.daemon(*PATIENCE) as daemon:
        async with beside_guests(daemon, scene.disks) as client:
            await scene.stream_to_end(client)
        scene.require_small(gap_length=GAP_LENGTH)
    scene.require_small(gap_length=GAP_LENGTH)
    scene.require_same_content()


@pytest.mark.parametrize("scene", CASES, indirect=True)
async def test_a_cancelled_stream_leaves_nothing_behind(scene: Scene) -> None:
    await scene.make_images()
    async with scene.daemon(*PATIENCE) as daemon:
        async with beside_guests(daemon, scene.disks) as client:
            for name in await stream_half(scene, client, daemon):
                with contextlib.suppress(QmpError):  # it has just come to its end
                    await client.command("block_stream_cancel", device=name)
                    await client.event("BLOCK_JOB_CANCELLED", device=name)
        scene.require_small(gap_length=GAP_LENGTH)
    scene.require_small(gap_length=GAP_LENGTH)


@pytest.mark.parametrize("scene", CASES, indirect=True)
async def test_what_a_kill_leaves_is_given_back(scene: Scene) -> None:
    await scene.make_images()
    with contextlib.suppress(ExceptionGroup):  # guests lose their disks
        async with scene.daemon(*PATIENCE) as daemon, beside_guests(daemon, scene.disks) as client:
            await stream_half(scene, client, daemon)
            await daemon.kill()
    async with scene.daemon(*PATIENCE):
        scene.require_small(gap_length=GAP_LENGTH)
    scene.require_small(gap_length=GAP_LENGTH)
