"""Trims and zeroes that need no waiting are what the awaitable ones are."""

import random
from pathlib import Path

import pytest

from blockd.drivers import NodeGraph
from blockd.extents import Kind
from blockd.formats.qcow2.image import Qcow2Image
from tests import qemu_img
from tests.recording import RecordingFile
from tests.streaming import overlay

CLUSTER = 4096
COUNT = 256


@pytest.mark.parametrize("with_backing", [False, True])
async def test_they_leave_the_same_image(tmp_path: Path, with_backing: bool) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * COUNT * CLUSTER)
    words = ("-b", base.name, "-F", "raw") if with_backing else ()
    graph, images, paths = NodeGraph(), [], []
    for name in ("nowait.qcow2", "usual.qcow2"):
        path = tmp_path / name
        qemu_img.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *words, path, "1M")
        paths.append(path)
        images.append(await graph.open_image(str(path), "qcow2", read_only=False))
    rng = random.Random(21)
    done = 0
    for _ in range(300):
        offset = rng.randrange(0, COUNT * CLUSTER, 512)
        length = min(rng.choice((512, CLUSTER, 5 * CLUSTER, 20_992)), COUNT * CLUSTER - offset)
        if rng.random() < 0.4:
            for image in images:
                await image.write(offset, b"g" * length)
            continue
        if rng.random() < 0.5:
            offset, length = offset - offset % CLUSTER, -(-length // CLUSTER) * CLUSTER
            length = min(length, COUNT * CLUSTER - offset)
        nowait, usual = images
        if rng.random() < 0.5:
            if nowait.discard_nowait(offset, length):
                done += 1
            else:
                await nowait.discard(offset, length)
            await usual.discard(offset, length)
        else:
            if nowait.write_zeroes_nowait(offset, length):
                done += 1
            else:
                await nowait.write_zeroes(offset, length)
            await usual.write_zeroes(offset, length)
    assert done > 50
    one, other = [bytes(await image.read(0, COUNT * CLUSTER)) for image in images]
    assert one == other
    await graph.close()
    for path in paths:
        qemu_img.assert_sound(path)


async def _image(**options: object) -> Qcow2Image:
    image = await overlay(RecordingFile(), None, COUNT * CLUSTER, cluster_size=CLUSTER, **options)  # type: ignore[arg-type]
    assert isinstance(image, Qcow2Image)
    await image.write(0, b"g" * 2 * CLUSTER)
    return image


async def test_a_part_of_a_cluster_takes_a_write() -> None:
    image = await _image()
    assert not image.write_zeroes_nowait(512, CLUSTER)
    assert await image.read(0, 2 * CLUSTER) == b"g" * 2 * CLUSTER
    assert image.discard_nowait(512, CLUSTER), "no whole cluster: there is nothing to do"
    assert await image.read(0, 2 * CLUSTER) == b"g" * 2 * CLUSTER
    assert image.discard_nowait(512, 2 * CLUSTER - 512)
    assert await image.read(0, 2 * CLUSTER) == b"g" * CLUSTER + bytes(CLUSTER)


async def test_who_may_not_write_changes_nothing() -> None:
    image = await _image()
    image.read_only = True
    assert not image.discard_nowait(0, CLUSTER)
    assert not image.write_zeroes_nowait(0, CLUSTER)
    assert image.kind_nowait(0, CLUSTER) is Kind.DATA


async def test_a_range_that_is_being_changed_is_waited_for() -> None:
    image = await _image()
    async with image._writes.ranges.held(0, CLUSTER):
        assert not image.discard_nowait(0, 2 * CLUSTER)
        assert not image.write_zeroes_nowait(0, CLUSTER)
    assert image.discard_nowait(0, CLUSTER)


async def test_much_at_once_is_done_in_turns() -> None:
    image = await _image()
    assert not image.discard_nowait(0, COUNT * CLUSTER)


async def test_subclusters_are_left_to_the_awaitable_form() -> None:
    image = await overlay(RecordingFile(), None, 1 << 20, cluster_size=16384, extended_l2=True)
    await image.write(0, b"g" * 16384)
    assert not image.discard_nowait(0, 16384)
    assert not image.write_zeroes_nowait(0, 16384)
