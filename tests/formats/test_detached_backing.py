"""Images whose backing file is recorded and not open: what guests were told is zero stays zero.

Without the backing they read as zeroes all over, whatever their map says; it has to say what remains true
when the backing is open again.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from blockd.block.node import OverlayNode
from blockd.formats.raw.image import RawImage
from blockd.units import KIB
from tests.chains import read_all
from tests.model import drawn
from tests.recording import RecordingFile
from tests.streaming import open_overlay, overlay

CLUSTER = 16 * KIB
COUNT = 8
SIZE = COUNT * CLUSTER - 512

FORMATS: dict[str, dict[str, Any]] = {
    "qcow2": {},
    "version 2": {"compat": "0.10"},
    "extended L2": {"extended_l2": True},
    "QED": {"image_format": "qed"},
    "add-cow": {"image_format": "add-cow"},
}
formats = pytest.mark.parametrize("options", FORMATS.values(), ids=list(FORMATS))

# By name: what is done without the backing, and the ranges that read as zeroes after it and for good.
Change = Callable[[OverlayNode], Awaitable[None]]
WHOLE, PART, ACROSS, END = (
    (CLUSTER, 2 * CLUSTER),
    (CLUSTER + 1024, 2048),
    (CLUSTER // 2, 3 * CLUSTER),
    (SIZE - CLUSTER, CLUSTER),
)


async def base_of(size: int = 2 * COUNT * CLUSTER) -> RawImage:
    content = drawn(["B" * (2 * COUNT)], CLUSTER)[:size]
    return await RawImage.open(RecordingFile(content, "base.raw"), node_name="base", read_only=True)


async def detached(options: dict[str, Any]) -> OverlayNode:
    """An image with data in its cluster 5, and its backing not open."""
    file = RecordingFile(name="disk")
    if options.get("image_format") == "add-cow":
        file.beside = RecordingFile(name="disk.data")
    image = await overlay(file, await base_of(), SIZE, cluster_size=CLUSTER, **options)
    await image.write(5 * CLUSTER, b"D" * CLUSTER)
    await image.close()
    return await open_overlay(file.again(), None)


async def reopened(image: OverlayNode) -> bytes:
    """What the disk holds with its backing, after it was closed."""
    await image.close()
    file = image.children()["file"]
    assert isinstance(file, RecordingFile)
    assert image.backing_filename == "base.raw"
    return await read_all(await open_overlay(file.again(), await base_of()))


@formats
@pytest.mark.parametrize("unmap", [True, False])
@pytest.mark.parametrize(("offset", "length"), [WHOLE, PART, ACROSS, END])
async def test_zeroes_written_without_the_backing(
    options: dict[str, Any], offset: int, length: int, unmap: bool
) -> None:
    image = await detached(options)
    await image.write_zeroes(offset, length, unmap=unmap)
    assert await image.read(offset, length) == bytes(length)
    image.backing = await base_of()  # as blockdev-reopen does
    assert await image.read(offset, length) == bytes(length)
    assert (await reopened(image))[offset : offset + length] == bytes(length)


@formats
async def test_zeroes_over_data_written_without_the_backing(options: dict[str, Any]) -> None:
    image = await detached(options)
    await image.write_zeroes(5 * CLUSTER, CLUSTER)
    assert (await reopened(image))[5 * CLUSTER : 6 * CLUSTER] == bytes(CLUSTER)


@formats
@pytest.mark.parametrize(("offset", "length"), [WHOLE, ACROSS, (5 * CLUSTER, CLUSTER), END])
async def test_discard_uncovers_nothing(options: dict[str, Any], offset: int, length: int) -> None:
    """A guest finds in what it discarded what it finds then, for as long as it does not write."""
    image = await detached(options)
    await image.discard(offset, length)
    found = await image.read(offset, length)
    content = await reopened(image)
    # Version 2 cannot say that a cluster is zero, and leaves data where it is; so is a part of a cluster.
    data = [at for at in range(offset, offset + length, 512) if content[at : at + 512] == b"D" * 512]
    assert all(found[at - offset : at - offset + 512] == b"D" * 512 for at in data)
    whole = range(-(-offset // CLUSTER) * CLUSTER, offset + length - CLUSTER + 1, CLUSTER)
    if "compat" not in options:
        assert all(content[at : at + CLUSTER] == bytes(CLUSTER) for at in whole)
    else:
        assert b"B" not in content[5 * CLUSTER : 6 * CLUSTER]


@formats
async def test_what_is_new_in_a_larger_disk_without_the_backing(options: dict[str, Any]) -> None:
    image = await detached(options)
    await image.resize(2 * COUNT * CLUSTER)
    assert await image.read(SIZE, COUNT * CLUSTER) == bytes(COUNT * CLUSTER)
    assert (await reopened(image))[SIZE:] == bytes(2 * COUNT * CLUSTER - SIZE)


@formats
async def test_image_that_records_no_backing_needs_no_zero_clusters(options: dict[str, Any]) -> None:
    file = RecordingFile(name="disk")
    if options.get("image_format") == "add-cow":
        file.beside = RecordingFile(name="disk.data")
    image = await overlay(file, None, SIZE, cluster_size=CLUSTER, **options)
    assert not image.is_backed
    before = len(file.disk)
    await image.write_zeroes(*WHOLE)
    await image.flush()
    assert len(file.disk) == before
