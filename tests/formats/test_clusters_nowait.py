"""Reads and writes of a few clusters that are here and there, without waiting."""

import random
from array import array
from pathlib import Path

import pytest

from blockd.drivers import NodeGraph
from blockd.formats.qcow2.image import Qcow2Image
from tests import qemu_img
from tests.recording import RecordingFile
from tests.streaming import overlay

CLUSTER = 4096
COUNT = 64


@pytest.mark.parametrize("image_format", ["qcow2", "qed"])
async def test_a_chain_in_pieces_is_read_at_once(tmp_path: Path, image_format: str) -> None:
    """What is read is what is there, also in parts of clusters and across layers."""
    rng = random.Random(31)
    content = bytearray(rng.randbytes(COUNT * CLUSTER))
    below = tmp_path / "base.raw"
    below.write_bytes(content)
    below_format = "raw"
    for number in range(3):
        path = tmp_path / f"{number}.{image_format}"
        link = ("-b", below.name, "-F", below_format)
        options = "cluster_size=4k"
        qemu_img.qemu("qemu-img", "create", "-q", "-f", image_format, *link, "-o", options, path)
        for cluster in rng.sample(range(COUNT), 20):
            byte = rng.randrange(1, 255)
            qemu_img.write(path, f"write -P {byte} {cluster * CLUSTER} 4k", image_format=image_format)
            content[cluster * CLUSTER : (cluster + 1) * CLUSTER] = bytes([byte]) * CLUSTER
        below, below_format = path, image_format
    graph = NodeGraph()
    try:
        image = await graph.open_image(str(below), image_format, read_only=True)
        await image.read(0, image.size)
        for _ in range(300):
            offset = 512 * rng.randrange(COUNT * CLUSTER // 512)
            length = min(512 * rng.randrange(1, 100), COUNT * CLUSTER - offset)
            found = image.read_nowait(offset, length)
            assert found is not None
            assert found == content[offset : offset + length]
        assert image.read_nowait(0, image.size) is None, "that many are read with a plan"
    finally:
        await graph.close()


async def _scattered() -> Qcow2Image:
    """An image whose clusters are its own, none behind the one before."""
    image = await overlay(RecordingFile(), None, COUNT * CLUSTER, cluster_size=CLUSTER)
    assert isinstance(image, Qcow2Image)
    for cluster in range(0, COUNT, 2):
        await image.write(cluster * CLUSTER, b"a" * CLUSTER)
    for cluster in range(1, COUNT, 2):
        await image.write(cluster * CLUSTER, b"a" * CLUSTER)
    return image


async def test_a_write_to_scattered_clusters_is_done_at_once() -> None:
    image, rng = await _scattered(), random.Random(32)
    content = bytearray(b"a" * COUNT * CLUSTER)
    for _ in range(200):
        offset = 512 * rng.randrange(COUNT * CLUSTER // 512)
        data = rng.randbytes(min(512 * rng.randrange(1, 100), COUNT * CLUSTER - offset))
        assert image.write_nowait(offset, data)
        content[offset : offset + len(data)] = data
    assert await image.read(0, image.size) == content


async def test_a_write_is_left_to_others_if_one_cluster_is_not_the_image_s_own() -> None:
    image = await _scattered()
    await image.discard(3 * CLUSTER, CLUSTER)
    table = image.metadata.mapping.tables[0]
    before = array("Q", table.entries)
    assert not image.write_nowait(2 * CLUSTER, b"b" * 3 * CLUSTER)
    assert await image.read(2 * CLUSTER, 3 * CLUSTER) == b"a" * CLUSTER + bytes(CLUSTER) + b"a" * CLUSTER
    assert table.entries == before
