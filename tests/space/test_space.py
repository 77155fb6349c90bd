"""How much room an image takes: what its data and its tables need, whatever became of the copying.

The zeroes of the source are written as data. An image that is copied at once takes what QEMU's does; one that
is streamed into has a table for its zeroes as well. At the end of a stream, after a cancel, a kill, a switch
that holds while the daemon goes on to serve the image, and when the image has been closed.
"""

import contextlib
import itertools

import pytest

from blockd.cli.image.convert import Source, convert_image
from tests.filesystems import FOLDER, TMPFS
from tests.qmp_client import QmpError
from tests.space.drawing import SHAPES, VERSION_2
from tests.space.scene import CACHED, DIRECT, Case, Scene, connected

PLACES = [(FOLDER, DIRECT), (FOLDER, CACHED), ("ext4", DIRECT), ("xfs", DIRECT), ("btrfs", DIRECT)]
ALL = [
    *(Case(shape, *place) for shape, place in itertools.product(SHAPES, PLACES)),
    Case(SHAPES[0], TMPFS, DIRECT),
]
QUICK = {"qcow2-folder-direct", "extended-l2-folder-direct"}
CASES = [
    pytest.param(case, id=str(case), marks=[] if str(case) in QUICK else pytest.mark.slow) for case in ALL
]


@pytest.mark.parametrize(
    "scene",
    # Nobody converts to add-cow: a raw image is enough.
    [
        *(case for case in CASES if "add-cow" not in str(case.id)),
        pytest.param(Case(VERSION_2, FOLDER, DIRECT), id="version-2", marks=pytest.mark.slow),
    ],
    indirect=True,
)
async def test_a_converted_image_takes_what_qemu_s_does(scene: Scene) -> None:
    for disk in scene.disks:
        source = Source(str(disk.source), "raw", ["/"])
        await convert_image(source, str(disk.image), disk.shape.new_image(disk.image), lambda _: None)
        disk.require_small(tables_length=0)
        disk.require_same_content()


@pytest.mark.parametrize("scene", CASES, indirect=True)
async def test_a_streamed_image_takes_what_its_data_need(scene: Scene) -> None:
    await scene.make_images()
    async with connected(scene.daemon()) as client:
        await scene.stream_to_end(client)
        scene.require_small()
    scene.require_small()
    scene.require_same_content()


@pytest.mark.parametrize("scene", CASES, indirect=True)
async def test_a_cancelled_stream_leaves_nothing_behind(scene: Scene) -> None:
    await scene.make_images()
    async with connected(scene.daemon()) as client:
        for name in await scene.stream_half(client):
            with contextlib.suppress(QmpError):  # it has just come to its end
                await client.command("block_stream_cancel", device=name)
                await client.event("BLOCK_JOB_CANCELLED", device=name)
        scene.require_small()
    scene.require_small()


@pytest.mark.parametrize("scene", CASES, indirect=True)
async def test_what_a_kill_leaves_is_given_back(scene: Scene) -> None:
    await scene.make_images()
    async with scene.daemon() as daemon, await daemon.qmp() as client:
        await scene.stream_half(client)
        await daemon.kill()
    async with connected(scene.daemon()) as client:
        await scene.stream_to_end(client)
        scene.require_small()
    scene.require_small()
    scene.require_same_content()


@pytest.mark.parametrize("scene", CASES, indirect=True)
async def test_an_image_that_is_switched_to_takes_what_its_data_need(scene: Scene) -> None:
    await scene.make_images()
    async with connected(scene.daemon(on_sources=True)) as client:
        for disk in scene.disks:
            overlay = {"filename": str(disk.image), "format": disk.shape.image_format}
            await client.command("block_switch", {"device": disk.name, **overlay})
        await scene.stream_to_end(client)
        scene.require_small()
    scene.require_small()
    scene.require_same_content()
