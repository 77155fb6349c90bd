"""Sweeps about what only add-cow images have: a bitmap in one file, data in another, an end as a plain image.

The named workloads of other formats run on add-cow images as well, both files on one tape.
"""

import random
from dataclasses import replace
from unittest.mock import patch

from blockd.errors import ImageError
from blockd.formats.add_cow import create as creation
from blockd.formats.add_cow.header import Header
from blockd.formats.add_cow.image import AddCowImage
from tests.chains import read_all
from tests.crash.creation import LONG_NAME
from tests.crash.promises import Sweep
from tests.crash.scene import BASE, Scene
from tests.crash.workloads import WORKLOADS, Workload
from tests.inline_threads import use_inline_threads
from tests.recording import RecordingFile, Timeline
from tests.streaming import check, create, open_overlay

CLUSTER = 4096


async def stream_over_rubbish(scene: Scene) -> None:
    """What a cancelled stream and lost writes have left in the image is not there until written anew."""
    await scene.stream_step()
    await scene.cancel()
    await scene.write(3.5, 2)
    await scene.close()
    await scene.discard(4, 1)
    await scene.read(0, 2.5)
    await scene.detach()
    await scene.write(0.5, 1)
    await scene.flush()


async def live_as_plain_image(scene: Scene) -> None:
    """When all is in the image, bits are no longer looked at: growing, zeroes and writes are the image's."""
    await scene.complete()
    await scene.grow(4)
    await scene.write(scene.cluster_count + 0.5, 2)
    await scene.zero(1, 2)
    await scene.flush()
    await scene.close()
    await scene.write(2.5, 1)
    await scene.flush()


async def stream_to_base_and_grow(scene: Scene) -> None:
    scene.base_name = BASE
    await scene.write(1.5, 1)
    await scene.complete()
    await scene.grow(3)
    await scene.write(scene.cluster_count + 1.5, 0.5)
    await scene.flush()


def _on_add_cow(workload: Workload) -> Workload:
    return replace(workload, cluster_size=CLUSTER, image_format="add-cow")


ADD_COW_WORKLOADS = [
    *(_on_add_cow(workload) for workload in WORKLOADS if workload.is_for_all),
    *(
        _on_add_cow(Workload(run))
        for run in (stream_over_rubbish, live_as_plain_image, stream_to_base_and_grow)
    ),
]


async def sweep_bitmap_growth() -> None:
    """A disk never is larger than its bitmap: a bitmap that is not rounded up to a cluster shows it."""
    use_inline_threads()
    file = _new_file()
    with patch.object(Header, "bitmap_length", _exact_bitmap_length):
        await create(file, 8 * CLUSTER, "add-cow", cluster_size=CLUSTER)
        recorded = _recorded(file)
        image = await open_overlay(recorded, None)
        await image.resize(24 * CLUSTER)
        assert recorded.beside is not None
        sizes = set()
        timeline = Timeline([recorded, recorded.beside], recorded.tape)
        for position, what, disks in timeline.states(random.Random(1), subset_count=4):
            opened = await open_overlay(_file_of(*disks), None, read_only=True)
            assert (await check(_file_of(*disks))).corruptions == 0, what
            sizes.add(opened.size)
            is_last = position == len(recorded.tape)
            assert opened.size == 24 * CLUSTER or not is_last, "the new size is not durable"
    assert sizes == {8 * CLUSTER, 24 * CLUSTER}


def _exact_bitmap_length(header: Header, size: int) -> int:
    return -(-size // (header.cluster_size * 8))


async def sweep_add_cow_creation() -> None:
    """While an add-cow file is made there is none, or all of it; an old one may be there until it is gone."""
    for before in (b"", b"\xff" * 32 * 512, await _used_file()):
        for name in ("base.raw", LONG_NAME):
            with patch.object(creation, "_CHUNK", CLUSTER):  # what was there is cleared in several steps
                await _sweep_creation(before, name)


async def _used_file() -> bytes:
    """An add-cow file of the same image, with clusters in it, and longer than the new one needs."""
    file = _new_file()
    await create(file, 64 * CLUSTER, "add-cow", cluster_size=CLUSTER)
    image = await open_overlay(file, None)
    await image.write(0, b"old" * 8192)
    await image.close()
    return bytes(file.disk).ljust(32 << 10, b"\0")


async def _sweep_creation(before: bytes, backing_name: str) -> None:
    file = _new_file(before)
    size = 8 * CLUSTER
    link = {"backing_filename": backing_name, "backing_format": "raw"}
    await create(file, size, "add-cow", cluster_size=CLUSTER, **link)
    assert file.beside is not None
    outcomes = set()
    for position, what, [disk] in Timeline([file]).states(random.Random(1), subset_count=4):
        if disk == before:
            continue
        state = _file_of(disk, bytes(size))
        try:
            report = await check(state)
            image = await open_overlay(state, None, read_only=True)
        except ImageError:
            outcomes.add("no image")
            assert position < len(file.log), "what was created is not durable"
            continue
        outcomes.add("image")
        assert isinstance(image, AddCowImage)
        assert (report.corruptions, report.allocated_clusters) == (0, 0), f"{what} at {position}"
        assert (image.size, image.backing_filename, image.backing_format) == (size, backing_name, "raw")
        assert await read_all(image) == bytes(size)
    assert outcomes == {"no image", "image"}


def _new_file(content: bytes = b"") -> RecordingFile:
    file = RecordingFile(content, "disk.add-cow")
    file.beside = RecordingFile(name="disk.data")
    return file


def _file_of(disk: bytes, image: bytes) -> RecordingFile:
    file = _new_file(disk)
    file.beside = RecordingFile(image, "disk.data")
    return file


def _recorded(made: RecordingFile) -> RecordingFile:
    """The same files, both on one tape from now on."""
    file = made.again()
    assert file.beside is not None
    file.beside.tape = file.tape
    return file


ADD_COW_SWEEPS: list[Sweep] = [sweep_bitmap_growth, sweep_add_cow_creation]
