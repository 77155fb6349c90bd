"""Disks that are made larger: by parts of clusters, too, and over a backing that ends anywhere."""

from pathlib import Path

import pytest

from blockd.drivers import NodeGraph
from blockd.units import KIB, MIB, SECTOR_SIZE
from tests import qemu_img
from tests.chains import read_all

KINDS = {
    "usual": ("qcow2", "cluster_size=64k", 64 * KIB),
    "version 2": ("qcow2", "compat=0.10", 64 * KIB),
    "small clusters": ("qcow2", "cluster_size=512", 512),
    "subclusters": ("qcow2", "cluster_size=64k,extended_l2=on", 64 * KIB),
    "large subclusters": ("qcow2", "cluster_size=2M,extended_l2=on", 2 * MIB),
    "qed": ("qed", "cluster_size=64k", 64 * KIB),
}


@pytest.mark.parametrize("added", ["a sector", "a part", "a cluster", "a cluster and a part"])
@pytest.mark.parametrize("old", ["whole", "cut", "a sector more"])
@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_new_is_zeroes_wherever_the_backing_ends(
    tmp_path: Path, kind: str, old: str, added: str
) -> None:
    image_format, options, cluster = KINDS[kind]
    old_size = 2 * cluster + {"whole": 0, "cut": -SECTOR_SIZE, "a sector more": SECTOR_SIZE}[old]
    part = max(cluster // 2, SECTOR_SIZE)
    lengths = {"a sector": SECTOR_SIZE, "a part": part, "a cluster": cluster}
    size = old_size + lengths.get(added, cluster + part)
    for number, base_size in enumerate(
        {old_size + SECTOR_SIZE, size - SECTOR_SIZE, size, size + 3 * cluster}
    ):
        base, path = tmp_path / f"base{number}", tmp_path / f"disk{number}"
        base.write_bytes(b"b" * base_size)
        words: list[str | Path] = [
            "-q",
            "-f",
            image_format,
            "-o",
            options,
            "-b",
            base,
            "-F",
            "raw",
            path,
            str(old_size),
        ]
        qemu_img.qemu("qemu-img", "create", *words)
        graph = NodeGraph()
        image = await graph.open_image(str(path), image_format, read_only=False)
        await image.resize(size)
        expected = (b"b" * min(old_size, base_size)).ljust(size, b"\0")
        assert await read_all(image) == expected
        await graph.close()
        assert qemu_img.content(path, image_format) == expected
        qemu_img.assert_sound(path, image_format)
