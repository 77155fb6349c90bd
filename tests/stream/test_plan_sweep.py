"""Whatever is planned to be read stays open, whichever operation begins at whichever await of the plan.

The plan goes on for some turns of the loop; then the calls that it has under way are held, and the operation
goes as far as it can. Only then do those calls act: with a file that was closed meanwhile they would fail, or
with its number used again read another one.
"""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockd.block.chain import chain_map
from blockd.block.image_paths import ImagePaths
from blockd.block.node import BlockNode, OverlayNode
from blockd.devices.changes import Change, make_changes
from blockd.devices.device import Device, Devices
from blockd.devices.overlays import SnapshotInFile, SnapshotOnNode, Switch
from blockd.devices.reopening import Reopen
from blockd.devices.stream_request import StreamRequest
from blockd.devices.streams import Streams
from blockd.drivers import NodeGraph
from blockd.errors import RequestError
from blockd.jobs.manager import JobManager
from blockd.units import KIB
from tests import qemu_img
from tests.chains import read_all
from tests.filesystems import Place
from tests.scheduled_threads import Threads, scheduled
from tests.stream.deep_chain import CLUSTER, NAMES, SIZE, make_chain
from tests.streaming import Observer

B0, B1, M, N, T = NAMES
# What the graph may be changed to: images with the same content.
OVERLAY, OTHER, MADE = "overlay.qcow2", "other.qcow2", "made.qcow2"
IMAGES = [*NAMES, OVERLAY, OTHER]
# A part of a cluster that the active image lacks, and of which no layer has the same.
PART = b"part" * 128
PART_OFFSET = 3 * CLUSTER + 20 * KIB
# Who still does nothing after so many turns waits for something.
IDLE_TURN_COUNT = 100


@dataclass(frozen=True)
class Disk:
    """The chain as it is open, and what a guest reads there."""

    folder: Path
    devices: Devices
    streams: Streams
    content: bytearray

    @property
    def device(self) -> Device:
        return self.devices.get("vda")

    def layer(self, name: str) -> OverlayNode:
        [found] = [
            node
            for node in self.devices.graph.nodes.values()
            if isinstance(node, OverlayNode) and node.filename == str(self.folder / name)
        ]
        return found

    def base_of(self, name: str) -> BlockNode:
        below = self.layer(name).backing
        assert below is not None
        return below

    async def change(self, change: Change) -> None:
        await make_changes(self.devices, [change])


@asynccontextmanager
async def opened(folder: Path, content: bytes) -> AsyncIterator[Disk]:
    graph = NodeGraph(ImagePaths())
    try:
        node = await graph.open_image(str(folder / T), "qcow2", read_only=False)
        devices = Devices(graph)
        devices.add("vda", node)
        async with JobManager(Observer()) as jobs:
            yield Disk(folder, devices, Streams(devices, jobs), bytearray(content))
    finally:
        await graph.close()


pytestmark = pytest.mark.slow

Work = Callable[[Disk], Coroutine[object, object, None]]


# -- what is planned ------------------------------------------------------------------------------


async def stream(disk: Disk, top: str, base: BlockNode) -> None:
    job = await disk.streams.start(StreamRequest(disk.layer(top), f"into-{top}", base))
    await job.wait_ended()
    assert job.error is None, job.error


async def stream_upper(disk: Disk) -> None:
    await stream(disk, T, disk.layer(M))


async def read(disk: Disk) -> None:
    async with disk.device.root.request() as node:
        assert await node.read(0, SIZE) == disk.content


async def write_a_part(disk: Disk) -> None:
    disk.content[PART_OFFSET : PART_OFFSET + len(PART)] = PART
    async with disk.device.root.request() as node:
        await node.write(PART_OFFSET, PART)


async def tell_status(disk: Disk) -> None:
    async with disk.device.root.request() as node:
        offset = 0
        while offset < SIZE:
            offset = (await chain_map(node, offset, SIZE - offset))[-1].end


PLANS = [stream_upper, read, write_a_part, tell_status]


# -- what is done meanwhile -----------------------------------------------------------------------


async def stream_lower(disk: Disk) -> None:
    await stream(disk, M, disk.base_of(B1))


async def switch(disk: Disk) -> None:
    await disk.change(Switch(disk.devices, disk.streams, "vda", str(disk.folder / OVERLAY), "qcow2"))


async def snapshot(disk: Disk) -> None:
    options = {"driver": "file", "filename": str(disk.folder / OVERLAY)}
    await disk.devices.graph.open({"driver": "qcow2", "node-name": "o", "file": options, "backing": None})
    await disk.change(SnapshotOnNode(disk.devices, disk.streams, "vda", "o"))


async def snapshot_sync(disk: Disk) -> None:
    names = {"device": "vda", "node_name": None, "overlay_name": None}
    made = {"filename": str(disk.folder / MADE), "format_name": "qcow2", "is_existing": False}
    await disk.change(SnapshotInFile(disk.devices, disk.streams, **names, **made))  # type: ignore[arg-type]


async def reopen_another_base(disk: Disk) -> None:
    """Put an image of the same content in the place of B1; that and B0 are closed then."""
    middle = disk.layer(M)
    await disk.devices.graph.open(
        {
            "driver": "qcow2",
            "node-name": "other",
            "read-only": True,
            "file": {"driver": "file", "filename": str(disk.folder / OTHER)},
            "backing": None,
        }
    )
    file = middle.children()["file"].node_name
    options = {"driver": "qcow2", "node-name": middle.node_name, "file": file, "backing": "other"}
    await disk.change(Reopen(disk.devices, disk.streams, {**options, "read-only": True}))


async def change_backing_file(disk: Disk) -> None:
    async with disk.devices.changing:
        await disk.devices.change_backing(disk.layer(M), str(disk.folder / B1))


OPERATIONS = [stream_lower, switch, snapshot, snapshot_sync, reopen_another_base, change_backing_file]


# -- one beside the other ---------------------------------------------------------------------------


async def go_on(threads: Threads, turn_count: int, held: int = 0) -> None:
    """Some turns of the loop; before each a call acts and is heard, if there is one more than `held`."""
    for _ in range(turn_count):
        if len(threads.calls) > held:
            threads.finish(threads.calls[held])
        await asyncio.sleep(0)


async def go_as_far_as_possible(threads: Threads) -> None:
    """All but the calls that are there now."""
    held, idle_count = len(threads.calls), 0
    while idle_count < IDLE_TURN_COUNT:
        idle_count = 0 if len(threads.calls) > held else idle_count + 1
        await go_on(threads, 1, held)


async def side_by_side(disk: Disk, plan: Work, operation: Work, turn: int) -> bool:
    """Begin the operation at some turn of the plan; tells whether the plan was under way still."""
    threads = Threads()
    with scheduled(threads):
        planned = asyncio.create_task(plan(disk))
        await go_on(threads, turn)
        is_under_way = not planned.done()
        other = asyncio.create_task(operation(disk))
        await go_as_far_as_possible(threads)
        await threads.run_all(planned, other)
        with contextlib.suppress(RequestError):  # it may be refused beside the plan
            other.result()
        planned.result()
        reading = asyncio.create_task(read_all(disk.device.root.top))
        await threads.run_all(reading)
        assert reading.result() == disk.content
    return is_under_way


async def sweep(folder: Path, plan: Work, operation: Work) -> None:
    """Begin the operation at every turn of the plan, each time in images as they were."""
    content = make_chain(folder)
    qemu_img.create(folder / OVERLAY, SIZE, backing=folder / T)
    qemu_img.qemu("qemu-img", "convert", "-O", "qcow2", folder / B1, folder / OTHER)
    kept = folder / "kept"
    kept.mkdir()
    for name in IMAGES:
        shutil.copy(folder / name, kept / name)
    turn, is_under_way = 0, True
    while is_under_way:
        for name in IMAGES:
            shutil.copy(kept / name, folder / name)
        (folder / MADE).unlink(missing_ok=True)
        async with opened(folder, content) as disk:
            is_under_way = await side_by_side(disk, plan, operation, turn)
        turn += 1


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.usefixtures("without_cloning")
async def test_nothing_is_closed_that_a_plan_names(tmp_path: Path, plan: Work, operation: Work) -> None:
    await sweep(tmp_path, plan, operation)


async def test_nothing_is_closed_that_is_cloned(reflink_place: Place) -> None:
    await sweep(reflink_place.path, stream_upper, stream_lower)
